"""Where examples come from. A source is opened by name, `NAME` or `NAME:ARGUMENT`, from the `data` section of a config."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data.source import Dataset
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
    """The function that opens `NAME[:ARGUMENT]`, and its argument as a list of none or one.

    Args:
      source: to find.
      where: the section that names it, for errors.

    Raises:
      ConfigError: no such source, or an argument missing or too many.
    """
    name, colon, argument = source.partition(":")
    if name not in SOURCES and colon:
        return config_lib.find(f"{where}.source", SOURCES, source), []  # the user's own, package.module:function
    function = config_lib.find(f"{where}.source", SOURCES, name)
    wanted = [p for p in config_lib.positional(function) if p not in ("data_dir", "given")]
    if len(wanted) != bool(argument):
        use = f"{name}:{wanted[0].upper()}" if wanted else name
        raise ConfigError(f"config.{where}.source: write it as {use!r}, got {source!r}.")
    return function, [argument] if colon else []


def resolve_source(section: Mapping, shared: Mapping[str, tuple[Any, Any]], where: str = "data", without: tuple[str, ...] = ()) -> dict:
    """The section of a source, every key with its value, types checked.

    Args:
      section: `source` and the source's keyword-only arguments, and of `shared` what is wanted.
      shared: keys that every source may have beside its own: name -> (type, default).
      where: the section's dotted name, for errors.
      without: keys of the source's own that are not to be given.
    """
    source = config_lib.check_value(f"{where}.source", section["source"], str)
    function, _ = find(source, where)
    allowed = {key: value for key, value in config_lib.fields(function).items() if key not in without} | dict(shared)
    rest = {key: value for key, value in section.items() if key != "source"}
    resolved = {"source": source} | config_lib.check_section(where, rest, allowed, f"the data source {source!r}")
    if hasattr(function, "resolve"):  # a source whose keys hold sections of their own
        resolved |= function.resolve(resolved, where)
    return resolved


def open_dataset(source: str, options: Mapping[str, Any], data_dir: str | None, given: Mapping | None = None) -> Dataset:
    """Opens a source. Files are checked here; examples are read later.

    Args:
      source: `NAME[:ARGUMENT]`.
      options: the source's keyword-only arguments.
      data_dir: where relative paths and TFDS folders are looked for, after the working directory;
        `JAXMODELS_DATA_DIR` if None.
      given: arrays by split, for the source `arrays`.
    """
    function, arguments = find(source)
    data_dir = data_dir or os.environ.get("JAXMODELS_DATA_DIR")
    framework = {"data_dir": data_dir, "given": given}
    extra = [framework[name] for name in config_lib.positional(function) if name in framework]
    dataset = function(*arguments, *extra, **options)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"config.data.source: {source!r} must return a jaxmodels.data.source.Dataset, not {type(dataset).__name__}.")
    unknown = [name for name in dataset.splits if name not in SPLITS]
    if unknown:
        raise ConfigError(f"config.data: a split is one of {', '.join(SPLITS)}; {source!r} has {', '.join(map(repr, unknown))}.")
    empty = [name for name, split in dataset.splits.items() if not len(split)]
    if empty:
        raise ConfigError(f"config.data: the split {empty[0]!r} of {source!r} has no examples.")
    return dataset
