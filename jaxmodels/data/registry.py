"""Sources of examples, opened by `NAME` or `NAME:ARGUMENT` from the `data` section of a config."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data import evaluation_sets, fitted, guesses
from jaxmodels.data.evaluation_sets import KEYS, SPLITS, key_of, main_of
from jaxmodels.data.shared import shared_examples
from jaxmodels.data.source import Arrays, Dataset, Untokenized
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


def open_dataset(
    source: str,
    options: Mapping[str, Any],
    data_dir: str | None,
    given: Mapping | None = None,
    *,
    sets: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
) -> Dataset:
    """Open a source. Files are checked here; images and audio are read later.

    Args:
      source: `NAME[:ARGUMENT]`.
      options: the source's keyword-only arguments.
      data_dir: directory where relative paths and TFDS folders are looked for, after the working directory;
        `JAXMODELS_DATA_DIR` if None.
      given: arrays by split, for the source `arrays`.
      sets: the further sets, by split, as `EvaluationSets.named` returns them.
      trained: the `info` of the training data, for data to evaluate: its tokenizer, class names and statistics are used.
    """
    sets, function = sets or {}, find(source)[0]
    options = dict(options) | _named_by_source(source, function, {split: value for split, value in sets.items() if isinstance(value, str)})
    spec = options.get("tokenizer")
    if trained is not None and spec is not None and "tokenizer" in trained:
        options["tokenizer"] = trained["tokenizer"]
    with guesses.collected() as found, fitted.to(trained, spec):
        dataset = open_source(source, options, data_dir, given)
        if isinstance(dataset, Untokenized):
            dataset = dataset.tokenize(dataset.tokenizer)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"config.data.source: {source!r} must return a jaxmodels.data.source.Dataset, not {type(dataset).__name__}.")
    for name in dataset.splits:
        evaluation_sets.check_split(name, f"config.data.source={source!r}")
    empty = [name for name, split in dataset.splits.items() if not len(split)]
    if empty:
        raise ConfigError(f"config.data: the split {empty[0]!r} of {source!r} has no examples.")
    dataset = dataclasses.replace(dataset, guesses=(*dataset.guesses, *found))
    for split, value in sets.items():
        if not isinstance(value, str):
            dataset = _with_set(dataset, split, value, {"source": source, **options, "tokenizer": spec}, data_dir, given)
    return dataset


# Further sets to evaluate


def resolve_sets(section: Mapping) -> dict:
    """Return a resolved section `data` whose further sets are checked: their names, and the keys of those that are sections."""
    evaluation_sets.check_names(section, "data")
    resolved = dict(section) | {key: dict(section[key]) if section[key] else None for key in KEYS.values()}
    for split, value in evaluation_sets.EvaluationSets.of(resolved).named().items():
        if isinstance(value, Mapping):
            _section_of_set(split, value, resolved)
    return resolved


def other_data(section: Mapping, changes: Mapping, where: str) -> dict:
    """Return the keys of other data: those of `section` with changes.

    With another `source`, keys of `section` stay as far as the other has them, but for those that say what each split reads, and those that are at the
    default of their source; nothing is held out of the other data unless a change says so.

    Args:
      section: `source`, and the source's own keys.
      changes: the keys that are others.
      where: dotted name of the changes, for errors.
    """
    if "source" not in changes:
        return {**section, **changes}
    before = config_lib.fields(find(section["source"])[0])
    after = config_lib.fields(find(config_lib.check_value(f"{where}.source", changes["source"], str), where)[0])
    common = before.keys() & after.keys() - {*SPLITS, *KEYS.values(), "holdout"}
    kept = {key: value for key, value in section.items() if key in common and (key == "tokenizer" or value != before[key][1])}
    return {**kept, **({"holdout": 0} if "holdout" in after else {}), **changes}


def _named_by_source(source: str, function: Callable, sets: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the options by which a source opens sets that are paths or names of splits."""
    result: dict[str, dict[str, str]] = {}
    for split, value in sets.items():
        key = KEYS[main_of(split)]
        if key not in config_lib.fields(function):
            raise ConfigError(
                f"{key_of(split)}={value!r}: {source!r} names no split by a path. Give a section of the keys that are others for this set, "
                "{'source': …, 'split': …}."
            )
        result.setdefault(key, {})[split.partition("/")[2]] = value
    return result


def _section_of_set(split: str, value: Mapping, section: Mapping) -> dict:
    """Return the resolved section of a set that is given as one; `section` is that of the training data."""
    where = key_of(split).removeprefix("config.")
    for key in ("tokenizer", "labels", *KEYS.values()):
        if key in value:
            raise ConfigError(f"config.{where}.{key}: a set has no {key} of its own; leave it out.")
    own = {"source", *config_lib.fields(find(section["source"])[0])} - set(KEYS.values())
    changes = {key: item for key, item in value.items() if key != "split"}
    wanted = config_lib.check_value(f"{where}.split", value.get("split", main_of(split)), str)
    evaluation_sets.check_split(wanted, f"config.{where}.split")
    keys = other_data({key: item for key, item in section.items() if key in own}, changes, where)
    return resolve_source(keys, {}, where) | {"split": wanted}


def _with_set(dataset: Dataset, split: str, value: Mapping, section: Mapping, data_dir: str | None, given: Mapping | None) -> Dataset:
    """Return a data set with a further set, which is a split of other data."""
    where = key_of(split)
    with _errors_of(where):
        keys = _section_of_set(split, value, section)
        source, wanted = keys.pop("source"), keys.pop("split")
        other = open_dataset(source, keys, data_dir, given, trained=dataset.info)
        fitted.agreed_info(other.info, dataset.info, f"{where}: its data differs from the training data")
        if wanted not in other.splits:
            hint = " To evaluate all of it: 'split': 'train'." if wanted != "train" and list(other.splits) == ["train"] else ""
            raise ConfigError(f"{where}.split: {source!r} has no {wanted}, only {', '.join(other.splits)}.{hint}")
    name = split.partition("/")[2]
    told = {kind: tuple(f"{name}: {text}" for text in getattr(other, kind)) for kind in ("notes", "fallbacks", "guesses")}
    both = {"train": dataset.splits.get("train"), split: other.splits[wanted]}
    if all(isinstance(part, Arrays) for part in both.values()):
        told["guesses"] += tuple(shared_examples(both))
    skipped = {split: other.skipped[wanted]} if other.skipped.get(wanted) else {}
    joined = {kind: (*getattr(dataset, kind), *texts) for kind, texts in told.items()}
    return dataclasses.replace(dataset, splits={**dataset.splits, split: other.splits[wanted]}, skipped={**dataset.skipped, **skipped}, **joined)


@contextlib.contextmanager
def _errors_of(where: str) -> Iterator[None]:
    """Name the set in the errors of its data."""
    try:
        yield
    except ConfigError as error:
        message = str(error)
        if message.startswith(where):
            raise
        raise ConfigError(message.replace("config.data", where, 1) if message.startswith("config.data") else f"{where}: {message}") from error
