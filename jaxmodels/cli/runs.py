"""Commands on run folders: lineage, merge, import, export."""

import json
import sys

from jaxmodels.cli.arguments import add_command, add_run, configure


def add(commands) -> None:
    """Add the commands."""
    lineage = add_command(commands, "lineage", run_lineage, "print the ancestors and descendants of a run as a tree")
    lineage.add_argument("--workdir", required=True, metavar="RUN", help="run folder")
    lineage.add_argument("--json", action="store_true", help="print one JSON object")

    merge = add_command(commands, "merge", run_merge, "merge a run's adapters, and copy the frozen weights of its parent, into a new run")
    add_run(merge)
    merge.add_argument("--output", required=True, metavar="DIR", help="a new folder")

    imports = add_command(commands, "import", run_import, "convert a pretrained model to a run folder, to evaluate, generate, export or fine-tune")
    imports.add_argument("model", metavar="hf:DIR_OR_ID", help="a folder with config.json and safetensors, a GGUF file, or an id on the Hugging Face Hub")
    imports.add_argument("output", metavar="DIR", help="a new folder")

    export = add_command(commands, "export", run_export, "export a run for Transformers: safetensors, config.json, tokenizer, model card")
    export.add_argument("run", metavar="RUN[@best|@latest|@STEP]", help="run folder and checkpoint; adapters are merged, except with --format=peft")
    export.add_argument("output", metavar="DIR", help="a new folder")
    formats = "transformers: weights, config, tokenizer, model card; gguf: one file for llama.cpp; peft: adapters only; stablehlo: the compiled forward pass (default: transformers)"
    export.add_argument("--format", choices=("transformers", "gguf", "peft", "stablehlo"), default="transformers", help=formats)
    export.add_argument(
        "--dtype",
        metavar="TYPE",
        help="of the weights: float32, bfloat16 or float16 (default: that of the imported model, else float32); of gguf, float16 or q8_0",
    )
    export.add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="maximum size of a weights file, in 10^9 bytes (default: 5)")


def run_lineage(options, _):
    """Print the lineage of a run."""
    from rich.console import Console

    from jaxmodels.runs import lineage

    family = lineage.lineage(options.workdir)
    if options.json:
        print(json.dumps(family))
    else:
        Console(width=None if sys.stdout.isatty() else 1000).print(lineage.tree(family, options.workdir), highlight=False)


def run_merge(options, _):
    """Merge a run."""
    configure(options)
    from jaxmodels.runs.merge import merge

    folder = merge(options.workdir, options.output)
    print(f"merged {options.workdir} into {folder.path}: {folder.manifest()['parameters']:,} parameters")


def run_import(options, _):
    """Convert a pretrained model to a run folder."""
    configure(options)
    from jaxmodels.inference.pretrained import import_run

    folder = import_run(options.model, options.output)
    print(f"imported {options.model} into {folder.path}: {folder.manifest()['parameters']:,} parameters")


def run_export(options, _):
    """Export a run."""
    configure(options)
    if options.format == "stablehlo":
        from jaxmodels.export.stablehlo import export_stablehlo

        path = export_stablehlo(options.run, options.output)
    elif options.format == "gguf":
        from jaxmodels.export.gguf import export_gguf

        path = export_gguf(options.run, options.output, dtype=options.dtype)
    elif options.format == "peft":
        from jaxmodels.export.peft import export_adapters

        path = export_adapters(options.run, options.output)
    else:
        from jaxmodels.export.transformers import export_run

        path = export_run(options.run, options.output, dtype=options.dtype, shard_gb=options.shard_gb)
    print(f"exported {options.run} to {path}: {', '.join(sorted(file.name for file in path.iterdir()))}")
