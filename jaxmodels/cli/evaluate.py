"""jaxmodels evaluate."""

import json

from jaxmodels.cli.arguments import add_command, add_machine, add_run, find_processes, join


def add(commands) -> None:
    """Add the command."""
    parser = add_command(commands, "evaluate", run_evaluate, "evaluate a checkpoint of a run on a split of its data")
    add_run(parser)
    parser.set_defaults(config=None)  # overrides of its keys are allowed
    parser.epilog = "--config.data.KEY=VALUE evaluates on other data, with the tokenizer, the classes and the statistics of the run"
    parser.add_argument("--split", help="train, validation or test, or a further set, validation/NAME or test/NAME (default: all that test)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine(parser)


def run_evaluate(options, overrides):
    """Evaluate, and print the metrics in process 0."""
    from jaxmodels.config import parse_override, set_at
    from jaxmodels.distributed import session
    from jaxmodels.errors import ConfigError
    from jaxmodels.inference import evaluate
    from jaxmodels.runs.checkpoint import parse_run
    from jaxmodels.runs.folder import RunFolder

    other: dict = {}
    for key, value in overrides.items():
        if not key.startswith("data."):
            raise ConfigError(f"--config.{key}: a run is evaluated by its own config; only keys of config.data may be others.")
        set_at(other, key.removeprefix("data."), parse_override(value))
    join(options, find_processes(options), lambda: evaluate.config_to_evaluate(RunFolder(parse_run(options.workdir)[0]), other))
    splits = None if options.split is None else [options.split]
    values = evaluate.evaluate_splits(options.workdir, splits, data_dir=options.data_dir, other_data=other)
    if not session.is_first():
        return
    if options.json:
        print(json.dumps(values if len(values) > 1 else next(iter(values.values()))))
        return
    for split, metrics in values.items():
        print(f"{options.workdir}, {split}: " + "  ".join(f"{k} {v:.6g}" for k, v in metrics.items()))
