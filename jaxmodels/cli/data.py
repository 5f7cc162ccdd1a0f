"""jaxmodels tokenizer and jaxmodels data."""

import json
import os

from jaxmodels.cli.arguments import add_command, add_config, add_data_dir, load, positive_int


def add(commands) -> None:
    """Add the commands."""
    text = "train a byte-level BPE tokenizer on text files, for --config.data.tokenizer=FILE"
    tokenizer = add_command(commands, "tokenizer", run_tokenizer, text)
    tokenizer.add_argument("--input", required=True, metavar="FILES", help="comma-separated paths and glob patterns: 'docs/**/*.txt,more.jsonl'")
    tokenizer.add_argument("--size", type=positive_int, default=8000, metavar="N", help="vocabulary size (default: 8000)")
    tokenizer.add_argument("--output", default="tokenizer.json", metavar="FILE", help="default: tokenizer.json")
    tokenizer.add_argument("--text_column", default="text", metavar="KEY", help="key of the text in JSON lines (default: text)")
    tokenizer.add_argument("--on_bad_example", choices=("error", "skip"), default="error", help="stop at an unreadable document, or skip it (default: error)")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    add_data_dir(tokenizer)

    data = add_command(commands, "data", run_data, "open a config's data, fill its caches, and print what it contains")
    add_config(data)
    data.add_argument("--examples", type=positive_int, default=3, metavar="N", help="training examples to print (default: 3)")
    data.add_argument("--limit", type=positive_int, default=20_000, metavar="N", help="examples to read of each split, evenly spaced (default: 20000)")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    add_data_dir(data)


def run_tokenizer(options, _):
    """Train a tokenizer."""
    from jaxmodels.data.train_tokenizer import train_tokenizer

    keys = {key: getattr(options, key) for key in ("text_column", "on_bad_example", "overwrite")}
    data_dir = options.data_dir or os.environ.get("JAXMODELS_DATA_DIR")
    print(train_tokenizer(options.input, options.size, options.output, data_dir=data_dir, **keys))


def run_data(options, overrides):
    """Print a report on a config's data."""
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends another image decoder
    from rich.console import Console

    from jaxmodels.data.inspect import inspect, print_report
    from jaxmodels.experiment.sections import resolve

    report = inspect(resolve(load(options, overrides)), data_dir=options.data_dir, examples=options.examples, limit=options.limit)
    if options.json:
        print(json.dumps(report))
    else:
        print_report(report, Console())
