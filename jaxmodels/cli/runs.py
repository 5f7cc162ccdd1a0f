"""Commands about runs: evaluate, lineage, import, export, merge, config."""

import json
import sys

from jaxmodels.cli.arguments import configure, find_processes, join, load


def run_evaluate(options, _):
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


def run_config(options, overrides):
    from jaxmodels import config as config_lib
    from jaxmodels.experiment.sections import published_keys, resolve

    config = load(options, overrides)
    resolved = resolve(config)
    if options.diff:
        other = resolve(config_lib.load_config(options.diff))
        changed = config_lib.differences(resolved, other)
        for key, (here, there) in changed.items():
            print(f"{key}: {here!r} in {options.config}, {there!r} in {options.diff}")
        if not changed:
            print("no differences")
    elif options.json:
        print(json.dumps(resolved, indent=2))
    else:
        origins = config_lib.origins(options.config, overrides, resolved) | published_keys(config.to_dict())
        flat = config_lib.flatten(resolved)
        width = max(map(len, flat))
        for key, value in flat.items():
            print(f"{key:<{width}}  {value!r:<24}  {origins[key]}")


def run_lineage(options, _):
    from rich.console import Console

    from jaxmodels.runs import lineage

    family = lineage.lineage(options.workdir)
    if options.json:
        print(json.dumps(family))
    else:
        Console(width=None if sys.stdout.isatty() else 1000).print(lineage.tree(family, options.workdir), highlight=False)


def run_import(options, _):
    configure(options)
    from jaxmodels.inference.pretrained import import_run

    folder = import_run(options.model, options.output)
    print(f"imported {options.model} into {folder.path}: {folder.manifest()['parameters']:,} parameters")


def run_export(options, _):
    configure(options)
    if options.format == "stablehlo":
        from jaxmodels.export.stablehlo import export_stablehlo

        path = export_stablehlo(options.run, options.output)
    elif options.format == "peft":
        from jaxmodels.export.peft import export_adapters

        path = export_adapters(options.run, options.output)
    else:
        from jaxmodels.export.transformers import export_run

        path = export_run(options.run, options.output, dtype=options.dtype, shard_gb=options.shard_gb)
    print(f"exported {options.run} to {path}: {', '.join(sorted(file.name for file in path.iterdir()))}")


def run_merge(options, _):
    configure(options)
    from jaxmodels.runs.merge import merge

    folder = merge(options.workdir, options.output)
    print(f"merged {options.workdir} into {folder.path}: {folder.manifest()['parameters']:,} parameters")
