"""Sources of examples, opened by `NAME` or `NAME:ARGUMENT` from the `data` section of a config."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data import guesses
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.errors import ConfigError

SOURCES = {
    "digits": "jaxmodels.data.sources.digits:digits",
    "digit_lines": "jaxmodels.data.sources.digits:digit_lines",
    "dates": "jaxmodels.data.sources.dates:dates",
    "python_docs": "jaxmodels.data.sources.text:python_docs",
    "python_code": "jaxmodels.data.sources.python_code:python_code",
    "python_packages": "jaxmodels.data.sources.python_code:python_packages",
    "text": "jaxmodels.data.sources.text:text",
    "chat": "jaxmodels.data.sources.chat:chat",
    "tsv": "jaxmodels.data.sources.rows:tsv",
    "csv_rows": "jaxmodels.data.sources.rows:csv_rows",
    "jsonl": "jaxmodels.data.sources.rows:jsonl",
    "parquet": "jaxmodels.data.sources.parquet:parquet",
    "webdataset": "jaxmodels.data.sources.webdataset:webdataset",
    "array_record": "jaxmodels.data.sources.array_record:array_record",
    "conll": "jaxmodels.data.sources.conll:conll",
    "csv": "jaxmodels.data.sources.table:csv_table",
    "images": "jaxmodels.data.sources.images:images",
    "hf": "jaxmodels.data.sources.huggingface:huggingface",
    "tfds": "jaxmodels.data.sources.tfds:tfds",
    "synthetic": "jaxmodels.data.sources.synthetic:synthetic",
    "arrays": "jaxmodels.data.source:arrays",
    "mixture": "jaxmodels.data.sources.mixture:mixture",
}
SPLITS = ("train", "validation", "test")


def find(source: str, where: str = "data") -> tuple[Callable, list[str]]:
    """Return the function that opens `NAME[:ARGUMENT]`, and a list of its argument, if any.

    Args:
      source: `NAME[:ARGUMENT]` or `package.module:function`.
      where: dotted name of the section, for errors.

    Raises:
      ConfigError: no such source, or an argument missing or too many.
    """
    name, colon, argument = source.partition(":")
    if name not in SOURCES and colon:
        return config_lib.find(f"{where}.source", SOURCES, source), []  # package.module:function
    function = config_lib.find(f"{where}.source", SOURCES, name)
    wanted = [p for p in config_lib.positional(function) if p not in ("data_dir", "given")]
    if len(wanted) != bool(argument):
        use = f"{name}:{wanted[0].upper()}" if wanted else name
        raise ConfigError(f"config.{where}.source: write it as {use!r}, got {source!r}.")
    return function, [argument] if colon else []


def resolve_source(section: Mapping, shared: Mapping[str, tuple[Any, Any]], where: str = "data", without: tuple[str, ...] = ()) -> dict:
    """Return the section of a source with all keys, types checked.

    Args:
      section: `source`, the source's keyword-only arguments, and keys of `shared`.
      shared: keys that every source has beside its own: name -> (type, default).
      where: dotted name of the section, for errors.
      without: keys of the source that may not be set.
    """
    source = config_lib.check_value(f"{where}.source", section["source"], str)
    function, _ = find(source, where)
    allowed = {key: value for key, value in config_lib.fields(function).items() if key not in without} | dict(shared)
    rest = {key: value for key, value in section.items() if key != "source"}
    resolved = {"source": source} | config_lib.check_section(where, rest, allowed, f"the data source {source!r}")
    if hasattr(function, "resolve"):  # a source whose keys are sections
        resolved |= function.resolve(resolved, where)
    return resolved


def open_source(source: str, options: Mapping[str, Any], data_dir: str | None, given: Mapping | None = None) -> Dataset | Untokenized:
    """Call the function of a source and return what it returns; arguments as those of `open_dataset`."""
    function, arguments = find(source)
    framework = {"data_dir": data_dir or os.environ.get("JAXMODELS_DATA_DIR"), "given": given}
    extra = [framework[name] for name in config_lib.positional(function) if name in framework]
    return function(*arguments, *extra, **options)


def open_dataset(source: str, options: Mapping[str, Any], data_dir: str | None, given: Mapping | None = None) -> Dataset:
    """Open a source. Files are checked here; images and audio are read later.

    Args:
      source: `NAME[:ARGUMENT]`.
      options: the source's keyword-only arguments.
      data_dir: directory where relative paths and TFDS folders are looked for, after the working directory;
        `JAXMODELS_DATA_DIR` if None.
      given: arrays by split, for the source `arrays`.
    """
    with guesses.collected() as found:
        dataset = open_source(source, options, data_dir, given)
        if isinstance(dataset, Untokenized):
            dataset = dataset.tokenize(dataset.tokenizer)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"config.data.source: {source!r} must return a jaxmodels.data.source.Dataset, not {type(dataset).__name__}.")
    unknown = [name for name in dataset.splits if name not in SPLITS]
    if unknown:
        raise ConfigError(f"config.data: a split is one of {', '.join(SPLITS)}; {source!r} has {', '.join(map(repr, unknown))}.")
    empty = [name for name, split in dataset.splits.items() if not len(split)]
    if empty:
        raise ConfigError(f"config.data: the split {empty[0]!r} of {source!r} has no examples.")
    return dataclasses.replace(dataset, guesses=(*dataset.guesses, *found))
