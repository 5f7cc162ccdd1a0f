"""jaxmodels config."""

import json
import os
import shutil

from jaxmodels.cli.arguments import add_command, add_config, load


def add(commands) -> None:
    """Add the command."""
    parser = add_command(commands, "config", run_config, "print a resolved config and the origin of each value, or explain a key")
    add_config(parser, required=False)
    parser.add_argument("--diff", metavar="OTHER", help="print only the differences from another config or run")
    explain = "print type, default and meaning: of a key (training.ema), a section (model), a name (model.gpt, optimizer.adamw), or all"
    parser.add_argument("--explain", metavar="KEY", help=explain)
    parser.add_argument("--markdown", action="store_true", help="with --explain: print Markdown tables")
    parser.add_argument("--json", action="store_true", help="print the config as JSON, without origins")


def run_config(options, overrides):
    """Print a resolved config, its differences from another, or the explanation of a key."""
    if options.explain:
        return _explain(options)
    from jaxmodels import config as config_lib
    from jaxmodels.errors import ConfigError
    from jaxmodels.experiment.sections import pretrained_keys, resolve

    if options.config is None:
        raise ConfigError("jaxmodels config needs --config=FILE or --explain=KEY.")

    config = load(options, overrides)
    resolved = resolve(config)
    if options.diff:
        _print_differences(options, resolved, resolve(config_lib.load_config(options.diff)))
    elif options.json:
        print(json.dumps(resolved, indent=2))
    else:
        origins = config_lib.origins(options.config, overrides, resolved) | pretrained_keys(config.to_dict())
        flat = config_lib.flatten(resolved)
        width = max(map(len, flat))
        for key, value in flat.items():
            print(f"{key:<{width}}  {value!r:<24}  {origins[key]}")
        _print_changes(options.config)


def _print_changes(spec: str) -> None:
    """Print the changes of a run's config, for a run folder."""
    from jaxmodels.runs import going_back
    from jaxmodels.runs.folder import RunFolder

    lines = going_back.describe(RunFolder(spec).manifest()) if os.path.isdir(spec) else []
    if lines:
        print("\nchanges of this run:", *lines, sep="\n  ")


def _print_differences(options, one, other) -> None:
    from jaxmodels.config import differences

    changed = differences(one, other)
    for key, (here, there) in changed.items():
        print(f"{key}: {here!r} in {options.config}, {there!r} in {options.diff}")
    if not changed:
        print("no differences")


def _explain(options) -> None:
    from jaxmodels.experiment import reference

    found = reference.explain(options.explain)
    if options.markdown:
        print(reference.to_markdown(found), end="")
        return
    brief = any(group.section == options.explain for group in found)
    print(reference.to_text(found, brief=brief, width=shutil.get_terminal_size((120, 24)).columns), end="")
    if brief and any(group.names for group in found):
        print(f"\nKeys of one name: jaxmodels config --explain {options.explain}.NAME")
