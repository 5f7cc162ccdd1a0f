"""The command line. JAX is imported inside the commands, so that help is instant."""

import argparse
import json
import os
import sys

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
        sub.add_argument("--cpu_devices", type=_positive, metavar="N", help="simulate N devices on the CPU, in each process")
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
        several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, on PORT and the next one")
        several.add_argument("--processes", metavar="N|tpu", help="how many there are; tpu asks a Cloud TPU VM; 1 is this one alone, whatever started it")
        several.add_argument("--process", metavar="I", help="which of them this is, from 0")
        several.add_argument("--start_limit", type=_seconds, default=300.0, metavar="SECONDS", help="in which all must have come (default: 300)")
        several.add_argument("--hang_limit", type=_seconds, default=30.0, metavar="SECONDS", help="of silence that end a run (default: 30)")
        several.add_argument("--stall_limit", type=_seconds, default=1800.0, metavar="SECONDS", help="without a step that end a run (default: 1800)")

    train = command("train", _train, "train a config, or go on with the run in --workdir")
    add_config(train)
    train.add_argument("--workdir", metavar="DIR", help="the run's folder (default: runs/NAME, after the config file)")
    train.add_argument("--overwrite", action="store_true", help="delete the run that is in --workdir")
    train.add_argument("--plan", metavar="PATH", help="of jaxmodels plan: the folder of --save, loaded in place of compiling, or the file of --json; far from it is said")
    train.add_argument("--dry_run", action="store_true", help="print config, parameters, bytes and FLOPs; train nothing")
    add_machine(train)

    evaluate = command("evaluate", _evaluate, "evaluate a run's weights on a split of its data")
    evaluate.add_argument("--workdir", required=True, metavar="RUN[@best|@latest|@STEP]", help="the run; the best checkpoint where one is kept, else the latest")
    evaluate.add_argument("--split", default="test", help="train, validation or test (default: test)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine(evaluate)

    plan = command("plan", _plan, "say what a config takes of chips that are not here: memory, time, cost; or search the best setting for them")
    add_config(plan)
    _add_plan(plan)

    _add_generate(command("generate", _generate, "make texts with a run: what follows a prompt, or of a seq2seq run what it becomes"))

    tokenizer = command("tokenizer", _tokenizer, "train a byte-level BPE tokenizer on text files; use it with --config.data.tokenizer=FILE")
    tokenizer.add_argument("--input", required=True, metavar="FILES", help="paths and patterns, comma-separated: 'docs/**/*.txt,more.jsonl'")
    tokenizer.add_argument("--size", type=_positive, default=8000, metavar="N", help="tokens (default: 8000)")
    tokenizer.add_argument("--output", default="tokenizer.json", metavar="FILE", help="default: tokenizer.json")
    tokenizer.add_argument("--text_column", default="text", metavar="KEY", help="key of the text in JSON lines (default: text)")
    tokenizer.add_argument("--on_bad_example", choices=("error", "skip"), default="error", help="what becomes of bad documents (default: error)")
    tokenizer.add_argument("--overwrite", action="store_true", help="write over --output")
    tokenizer.add_argument("--data_dir", metavar="DIR", help="where data lies (default: $JAXMODELS_DATA_DIR)")

    data = command("data", _data, "open a config's data, make what it caches, and tell what it holds")
    add_config(data)
    data.add_argument("--examples", type=_positive, default=3, metavar="N", help="training examples to show (default: 3)")
    data.add_argument("--limit", type=_positive, default=20_000, metavar="N", help="examples of a split to read, spread evenly (default: 20000)")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    data.add_argument("--data_dir", metavar="DIR", help="where data lies (default: $JAXMODELS_DATA_DIR)")

    config = command("config", _config, "print a resolved config and where each value comes from")
    add_config(config)
    config.add_argument("--diff", metavar="OTHER", help="print only what differs from another config or run")
    config.add_argument("--json", action="store_true", help="print the config as JSON, without origins")

    lineage = command("lineage", _lineage, "print what a run started from, and what started from it, as a tree")
    lineage.add_argument("--workdir", required=True, metavar="RUN", help="the run")
    lineage.add_argument("--json", action="store_true", help="print one JSON object")

    merge = command("merge", _merge, "write a run with adapters, or one that borrows frozen weights, as a whole run of its own")
    merge.add_argument("--workdir", required=True, metavar="RUN[@best|@latest|@STEP]", help="the run")
    merge.add_argument("--output", required=True, metavar="DIR", help="a new folder")

    imports = command("import", _import, "write a published model as a run, to evaluate, generate from, export and start from")
    imports.add_argument("model", metavar="hf:DIR_OR_ID", help="a folder with config.json and safetensors, or the id of one on the Hugging Face hub")
    imports.add_argument("output", metavar="DIR", help="a new folder")

    export = command("export", _export, "write a run as a published model: safetensors, config.json, tokenizer, model card")
    export.add_argument("run", metavar="RUN[@best|@latest|@STEP]", help="the run; adapters are merged, but for --format=peft")
    export.add_argument("output", metavar="DIR", help="a new folder")
    formats = "transformers: weights, config, tokenizer, card; peft: the adapters alone; stablehlo: the forward pass as a program (default: transformers)"
    export.add_argument("--format", choices=("transformers", "peft", "stablehlo"), default="transformers", help=formats)
    export.add_argument("--dtype", metavar="TYPE", help="of the weights: float32, bfloat16 or float16 (default: as imported, else float32)")
    export.add_argument("--shard_gb", type=float, default=5.0, metavar="GB", help="size of a file at most, in 10^9 bytes (default: 5)")
    return root


def _add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--topology", required=True, metavar="NAME", help="v5p-128, v6e-256, v5p:4x4x4, 4xv5p-128 (slices), h100x8, 2xh100x8 (nodes)")
    sub.add_argument("--json", metavar="FILE", help="write the figures there")
    sub.add_argument("--hlo", metavar="FILE", help="write the optimized program's text there")
    sub.add_argument("--save", metavar="DIR", help="keep the compiled step there: jaxmodels train --plan=DIR loads it in place of compiling")
    sub.add_argument("--search", action="store_true", help="over meshes, accumulation and rematerialisation; the figures are then those of the best")
    sub.add_argument("--write", metavar="FILE", help="of --search: write the best as a config, for --config")
    sub.add_argument("--budget", type=_seconds, metavar="SECONDS", help="of --search: the time it may take (default: 900)")
    sub.add_argument("--data_dir", metavar="DIR", help="where data lies (default: $JAXMODELS_DATA_DIR)")


def _add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workdir", required=True, metavar="RUN[@best|@latest|@STEP]", help="the run; the best checkpoint where one is kept, else the latest")
    sub.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="given several times, a text is made of each")
    sub.add_argument("--max_tokens", type=int, metavar="N", help="new tokens at most (default: 128, or as many as the model's context leaves)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="the logits are divided by; 0, the default, takes the likeliest token")
    sub.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sub.add_argument("--top_p", type=float, metavar="P", help="draw from the likeliest tokens that have this probability together")
    sub.add_argument("--min_p", type=float, metavar="P", help="draw from tokens that have this share of the likeliest one's probability")
    sub.add_argument("--repetition_penalty", type=float, metavar="R", help="above 1, tokens that are there already become less likely")
    sub.add_argument("--beams", type=int, default=1, metavar="K", help="search for the likeliest text, following K at a time")
    sub.add_argument("--length_penalty", type=float, default=1.0, metavar="A", help="of beams: above 0, longer texts gain (default: 1)")
    sub.add_argument("--early_stopping", choices=("true", "false", "never"), default="false", help="of beams: end with K complete texts; or only when none can be better")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a string that ends a text; may be given several times")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing (default: 0)")
    sub.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--stream", action="store_true", help="print the text of one prompt as it comes")
    shown.add_argument("--json", action="store_true", help="print one JSON object")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 1, got {text!r}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Runs one command; returns its exit status."""
    arguments, overrides = _split(argv)
    root = parser()
    options = root.parse_args(arguments)
    if overrides and not hasattr(options, "config"):
        root.error(f"{options.command} takes no --config.{next(iter(overrides))}")
    from jaxmodels.errors import Interrupted, RunError
    from jaxmodels.parallel import session

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


def _split(argv: list[str]) -> tuple[list[str], dict]:
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


def _load(options, overrides):
    from jaxmodels.config import load_config, parse_override

    return load_config(options.config, {key: parse_override(text) for key, text in overrides.items()})


def _start(options) -> None:
    """Settings that must stand before JAX finds its devices."""
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and Grain tell of every step they take
    if options.cpu_devices:
        from jaxmodels.parallel.mesh import simulate_devices

        simulate_devices(options.cpu_devices)


def _processes(options):
    """The processes of this command; None for one alone."""
    from jaxmodels.parallel import processes

    return processes.find(options.coordinator, options.processes, options.process)


def _join(options, processes, load):
    """The config that `load` gives, with the devices' settings made, and this process among the others where there are several."""
    from jaxmodels.errors import RunError

    try:
        config, error = load(), None
        resolved = _resolved(config) if processes is not None else {}
    except RunError as problem:
        if processes is None:
            raise
        config, resolved, error = None, {}, problem
    _start(options)
    if processes is not None:
        from jaxmodels.parallel import session

        limits = {name: getattr(options, name) for name in ("start_limit", "hang_limit", "stall_limit")}
        session.join(processes, resolved | _same_arguments(options), error=error, **limits)
    return config


def _resolved(config) -> dict:
    """A config as processes compare it, with every key's value."""
    from jaxmodels.config import flatten
    from jaxmodels.sections import resolve

    return {f"config.{key}": value for key, value in flatten(resolve(config)).items()}


def _same_arguments(options) -> dict:
    """The arguments that all processes of a run must have been given alike."""
    names = ("command", "workdir", "overwrite", "plan", "split", "cpu_devices", "hang_limit", "stall_limit")
    return {f"--{name}": getattr(options, name) for name in names if hasattr(options, name)}


def _train(options, overrides):
    from jaxmodels.allocator import keep_freed_memory
    from jaxmodels.errors import Interrupted
    from jaxmodels.parallel import session
    from jaxmodels.training.signals import StopSignals

    keep_freed_memory()
    processes = None if options.dry_run else _processes(options)
    try:
        # From the first moment on: importing and building take seconds.
        with StopSignals() as stop, stop.may_raise():
            from rich.console import Console

            config = _join(options, processes, lambda: _load(options, overrides))
            from jaxmodels.config import split_spec
            from jaxmodels.experiment import build_experiment
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
    result = trainer.train(experiment, options.workdir or os.path.join("runs", name), overwrite=options.overwrite, plan=options.plan, console=console)
    if session.is_first():
        summary.print_summary(result, experiment, console)
    return 0


def _evaluate(options, _):
    from jaxmodels.parallel import session
    from jaxmodels.training.checkpoint import parse_run
    from jaxmodels.training.run_folder import RunFolder

    _join(options, _processes(options), lambda: RunFolder(parse_run(options.workdir)[0]).config())
    from jaxmodels import api

    values = api.evaluate(options.workdir, split=options.split, data_dir=options.data_dir)
    if not session.is_first():
        return
    if options.json:
        print(json.dumps(values))
        return
    print(f"{options.workdir}, {options.split}: " + "  ".join(f"{k} {v:.6g}" for k, v in values.items()))


def _plan(options, overrides):
    import logging

    from jaxmodels.errors import ConfigError, Interrupted
    from jaxmodels.training.signals import StopSignals

    for name in ("write", "budget"):
        if getattr(options, name) is not None and not options.search:
            raise ConfigError(f"--{name} is of --search: give both, or neither.")
    logging.getLogger("absl").setLevel(logging.ERROR)  # as in _start
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # devices that are here have no part in it
    try:
        with StopSignals() as stop, stop.may_raise():
            from rich.console import Console

            from jaxmodels.experiment import build_experiment
            from jaxmodels.plan import report

            files = {"json": options.json, "hlo": options.hlo, "save": options.save}
            console = Console(width=None if sys.stdout.isatty() else 200)
            topology = report.check(options.topology, files)
            found = stop.run(_search, options, overrides, console) if options.search else None
            if found is not None:
                overrides = overrides | {key: repr(value) for key, value in found.best.changes.items()}
            if found is not None and found.best.plan and not (options.hlo or options.save):
                report.write_found(found, options.json)  # it is compiled, and all is known
                return
            experiment = build_experiment(_load(options, overrides), data_dir=options.data_dir)
            plan = stop.run(report.plan_and_write, experiment, topology, files, found)
            report.print_plan(plan, console)
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped; there is nothing to save.") from None


def _search(options, overrides, console):
    """What `--search` found, printed and written."""
    from jaxmodels.plan import search

    if options.write:
        search.check_output(options.write)
    found = search.search(options.config, overrides, options.topology, budget=options.budget or 900.0, data_dir=options.data_dir)
    search.print_found(found, console)
    if options.write:
        search.write_config(options.write, options.config, overrides, found)
        console.print(f"{options.write} is the best as a config: jaxmodels train --config={options.write}\n", highlight=False, markup=False, soft_wrap=True)
    return found


def _generate(options, _):
    from jaxmodels.errors import ConfigError, Interrupted
    from jaxmodels.training.signals import StopSignals

    if options.stream and len(options.prompt) > 1:
        raise ConfigError("--stream shows one text as it comes: give one --prompt, or leave out --stream.")
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "beams", "length_penalty", "seed", "precision")
    chosen = {name: getattr(options, name) for name in names}
    chosen |= {"stop": options.stop, "early_stopping": {"true": True, "false": False}.get(options.early_stopping, options.early_stopping)}
    _start(options)
    try:
        with StopSignals() as stop, stop.may_raise():
            import jax

            from jaxmodels import api
            from jaxmodels.training.compile import use_persistent_cache

            if problem := use_persistent_cache():
                print(f"jaxmodels: {problem}", file=sys.stderr)
            run = api.load(options.workdir, spread=jax.device_count() > 1)
            continues = run.config["task"]["name"] == "language_model"
            if options.stream:
                _print_stream(options.prompt[0] if continues else "", run.stream(options.prompt[0], **chosen))
                return
            completions = run.generate(options.prompt, **chosen)
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped; there is nothing to save.") from None
    if options.json:
        shown = [{"prompt": c.prompt, "text": c.text, "tokens": c.tokens, "finish": c.finish, "score": c.score} for c in completions]
        print(json.dumps({"run": options.workdir, "step": run.step, "completions": shown}))
        return
    for completion in completions:
        print((completion.prompt if continues else "") + completion.text)


def _print_stream(before: str, pieces) -> None:
    pieces = iter(pieces)
    print(before, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _tokenizer(options, _):
    from jaxmodels.data.train_tokenizer import train_tokenizer

    keys = {key: getattr(options, key) for key in ("text_column", "on_bad_example", "overwrite")}
    data_dir = options.data_dir or os.environ.get("JAXMODELS_DATA_DIR")
    print(train_tokenizer(options.input, options.size, options.output, data_dir=data_dir, **keys))


def _data(options, overrides):
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends another image decoder
    from rich.console import Console

    from jaxmodels.data.inspect import inspect, print_report
    from jaxmodels.sections import resolve

    report = inspect(resolve(_load(options, overrides)), data_dir=options.data_dir, examples=options.examples, limit=options.limit)
    if options.json:
        print(json.dumps(report))
    else:
        print_report(report, Console())


def _config(options, overrides):
    from jaxmodels import config as config_lib
    from jaxmodels.sections import published_keys, resolve

    config = _load(options, overrides)
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


def _lineage(options, _):
    from rich.console import Console

    from jaxmodels.training import lineage

    family = lineage.lineage(options.workdir)
    if options.json:
        print(json.dumps(family))
    else:
        Console(width=None if sys.stdout.isatty() else 1000).print(lineage.tree(family, options.workdir), highlight=False)


def _import(options, _):
    _start(options)
    from jaxmodels.interop.as_run import import_run

    folder = import_run(options.model, options.output)
    print(f"imported {options.model} into {folder.path}: {folder.manifest()['parameters']:,} parameters")


def _export(options, _):
    _start(options)
    if options.format == "stablehlo":
        from jaxmodels.interop.stablehlo import export_stablehlo

        path = export_stablehlo(options.run, options.output)
    elif options.format == "peft":
        from jaxmodels.interop.peft_export import export_adapters

        path = export_adapters(options.run, options.output)
    else:
        from jaxmodels.interop.export import export_run

        path = export_run(options.run, options.output, dtype=options.dtype, shard_gb=options.shard_gb)
    print(f"exported {options.run} to {path}: {', '.join(sorted(file.name for file in path.iterdir()))}")


def _merge(options, _):
    _start(options)
    from jaxmodels.training.merge import merge

    folder = merge(options.workdir, options.output)
    print(f"merged {options.workdir} into {folder.path}: {folder.manifest()['parameters']:,} parameters")
