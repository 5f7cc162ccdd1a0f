"""jaxmodels data and jaxmodels tokenizer."""

import json
import os

from jaxmodels.cli.arguments import load


def run_tokenizer(options, _):
    from jaxmodels.data.train_tokenizer import train_tokenizer

    keys = {key: getattr(options, key) for key in ("text_column", "on_bad_example", "overwrite")}
    data_dir = options.data_dir or os.environ.get("JAXMODELS_DATA_DIR")
    print(train_tokenizer(options.input, options.size, options.output, data_dir=data_dir, **keys))


def run_data(options, overrides):
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
