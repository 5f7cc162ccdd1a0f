"""The command line. JAX is imported inside the commands, so that help is instant."""

import argparse
import os
import sys

from jaxmodels.cli.arguments import positive_int, seconds
from jaxmodels.cli.data import run_data, run_tokenizer
from jaxmodels.cli.generate import add_generate, run_generate
from jaxmodels.cli.plan import add_plan, run_plan
from jaxmodels.cli.runs import run_config, run_evaluate, run_export, run_import, run_lineage, run_merge
from jaxmodels.cli.train import run_train

DESCRIPTION = """\
Train Flax models with Optax from one config file.

  jaxmodels train --config=configs/cnn_digits.py --workdir=runs/cnn_digits
  jaxmodels train --config=FILE[:ARGUMENT] --config.optimizer.learning_rate=3e-4
  jaxmodels evaluate --workdir=runs/cnn_digits
  jaxmodels generate --workdir=runs/gpt_shakespeare --prompt="To be"
  jaxmodels config --config=configs/cnn_digits.py --diff=runs/cnn_digits
  jaxmodels data --config=configs/cnn_digits.py
  jaxmodels plan --config=configs/gpt2_xl.py --topology=v5p-128
  jaxmodels lineage --workdir=runs/cnn_digits
  jaxmodels merge --workdir=runs/lora --output=runs/merged
  jaxmodels import hf:DIR_OR_ID runs/published
  jaxmodels export runs/cnn_digits DIR

Any value of a config is set with --config.SECTION.KEY=VALUE.
Exit status: 0 finished, 1 failed, 2 bad config or usage, 3 diverged, 75 stopped by a signal after saving.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    root = argparse.ArgumentParser(prog="jaxmodels", description=DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, function, summary):
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("--cpu_devices", type=positive_int, metavar="N", help="simulate N devices on the CPU, in each process")
        return sub

    def add_config(sub):
        sub.add_argument(
            "--config",
            required=True,
            metavar="FILE[:ARG]",
            help="a Python file with get_config(), a config.json, or a run's folder; --config.SECTION.KEY=VALUE overrides a value",
        )

    def add_machine(sub):
        sub.add_argument("--data_dir", metavar="DIR", help="where data lies (default: $JAXMODELS_DATA_DIR)")
        several = sub.add_argument_group("several processes", "found out under srun, mpirun and in a JobSet; launch/local.sh starts them on one machine")
        several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, which listens on PORT")
        several.add_argument("--processes", metavar="N|tpu", help="how many there are; tpu asks a Cloud TPU VM; 1 is this one alone, whatever started it")
        several.add_argument("--process", metavar="I", help="which of them this is, from 0")
        several.add_argument("--start_limit", type=seconds, default=300.0, metavar="SECONDS", help="in which all must have come (default: 300)")
        several.add_argument("--hang_limit", type=seconds, default=30.0, metavar="SECONDS", help="of silence that end a run (default: 30)")
        several.add_argument("--stall_limit", type=seconds, default=1800.0, metavar="SECONDS", help="without a step that end a run (default: 1800)")

    train = command("train", run_train, "train a config, or go on with the run in --workdir")
    add_config(train)
    train.add_argument("--workdir", metavar="DIR", help="the run's folder (default: runs/NAME, after the config file)")
    train.add_argument("--overwrite", action="store_true", help="delete the run that is in --workdir")
    train.add_argument(
        "--plan", metavar="PATH", help="of jaxmodels plan: the folder of --save, loaded in place of compiling, or the file of --json; far from it is said"
    )
    train.add_argument("--dry_run", action="store_true", help="print config, parameters, bytes and FLOPs; train nothing")
    add_machine(train)

    evaluate = command("evaluate", run_evaluate, "evaluate a run's weights on a split of its data")
    evaluate.add_argument(
        "--workdir", required=True, metavar="RUN[@best|@latest|@STEP]", help="the run; the best checkpoint where one is kept, else the latest"
    )
    evaluate.add_argument("--split", default="test", help="train, validation or test (default: test)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine(evaluate)

    plan = command("plan", run_plan, "say what a config takes of chips that are not here: memory, time, cost; or search the best setting for them")
    add_config(plan)
    add_plan(plan)

    add_generate(command("generate", run_generate, "make texts with a run: what follows a prompt, or of a seq2seq run what it becomes"))

    tokenizer = command("tokenizer", run_tokenizer, "train a byte-level BPE tokenizer on text files; use it with --config.data.tokenizer=FILE")
    tokenizer.add_argument("--input", required=True, metavar="FILES", help="paths and patterns, comma-separated: 'docs/**/*.txt,more.jsonl'")
    tokenizer.add_argument("--size", type=positive_int, default=8000, metavar="N", help="tokens (default: 8000)")
    tokenizer.add_argument("--output", default="tokenizer.json", metavar="FILE", help="default: tokenizer.json")
    tokenizer.add_argument("--text_column", default="text", metavar="KEY", help="key of the text in JSON lines (default: text)")
    tokenizer.add_argument("--on_bad_example", choices=("error", "skip"), default="error", help="what becomes of bad documents (default: error)")
    tokenizer.add_argument("--overwrite", action="store_true", help="write over --output")
    tokenizer.add_argument("--data_dir", metavar="DIR", help="where data lies (default: $JAXMODELS_DATA_DIR)")

    data = command("data", run_data, "open a config's data, make what it caches, and tell what it holds")
    add_config(data)
    data.add_argument("--examples", type=positive_int, default=3, metavar="N", help="training examples to show (default: 3)")
    data.add_argument("--limit", type=positive_int, default=20_000, metavar="N", help="examples of a split to read, spread evenly (default: 20000)")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    data.add_argument("--data_dir", metavar="DIR", help="where data lies (default: $JAXMODELS_DATA_DIR)")

    config = command("config", run_config, "print a resolved config and where each value comes from")
    add_config(config)
    config.add_argument("--diff", metavar="OTHER", help="print only what differs from another config or run")
    config.add_argument("--json", action="store_true", help="print the config as JSON, without origins")

    lineage = command("lineage", run_lineage, "print what a run started from, and what started from it, as a tree")
    lineage.add_argument("--workdir", required=True, metavar="RUN", help="the run")
    lineage.add_argument("--json", action="store_true", help="print one JSON object")

    merge = command("merge", run_merge, "write a run with adapters, or one that borrows frozen weights, as a whole run of its own")
    merge.add_argument("--workdir", required=True, metavar="RUN[@best|@latest|@STEP]", help="the run")
    merge.add_argument("--output", required=True, metavar="DIR", help="a new folder")

    imports = command("import", run_import, "write a published model as a run, to evaluate, generate from, export and start from")
    imports.add_argument("model", metavar="hf:DIR_OR_ID", help="a folder with config.json and safetensors, or the id of one on the Hugging Face hub")
    imports.add_argument("output", metavar="DIR", help="a new folder")

    export = command("export", run_export, "write a run as a published model: safetensors, config.json, tokenizer, model card")
    export.add_argument("run", metavar="RUN[@best|@latest|@STEP]", help="the run; adapters are merged, but for --format=peft")
    export.add_argument("output", metavar="DIR", help="a new folder")
    formats = "transformers: weights, config, tokenizer, card; peft: the adapters alone; stablehlo: the forward pass as a program (default: transformers)"
    export.add_argument("--format", choices=("transformers", "peft", "stablehlo"), default="transformers", help=formats)
    export.add_argument("--dtype", metavar="TYPE", help="of the weights: float32, bfloat16 or float16 (default: as imported, else float32)")
    export.add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="size of a file at most, in 10^9 bytes (default: 5)")
    return root


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Runs one command; returns its exit status."""
    arguments, overrides = split_overrides(argv)
    root = parser()
    options = root.parse_args(arguments)
    if overrides and not hasattr(options, "config"):
        root.error(f"{options.command} takes no --config.{next(iter(overrides))}")
    from jaxmodels.distributed import session
    from jaxmodels.errors import Interrupted, RunError

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        status = options.function(options, overrides) or 0
        session.finish()
        return status
    except Interrupted as error:
        print(f"jaxmodels: {error}", file=sys.stderr, flush=True)
        session.leave(error)
        # A compilation may still run in a thread, which the interpreter would wait for.
        os._exit(error.exit_status)
    except RunError as error:
        print(f"jaxmodels: {error}", file=sys.stderr, flush=True)
        session.leave(error)
        return error.exit_status
    except BaseException as error:
        session.leave(error)
        raise


def split_overrides(argv: list[str]) -> tuple[list[str], dict]:
    """Arguments, and the overrides among them: dotted key -> text."""
    rest, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith("--config."):
            key, equals, value = argument.removeprefix("--config.").partition("=")
            overrides[key] = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return rest, overrides
