"""Contents of a data set: sizes, balance, lengths, and a few readable examples."""

import concurrent.futures
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxmodels import config as config_lib
from jaxmodels.data import registry as data_lib
from jaxmodels.data.evaluation_sets import SPLITS, EvaluationSets, of
from jaxmodels.data.features.base import Feature
from jaxmodels.data.features.table import BY_ARRAY
from jaxmodels.data.features.text import TEXTS
from jaxmodels.data.loader import Loading
from jaxmodels.data.reading import errors_of
from jaxmodels.data.source import Dataset, DataSource, get_batch

_CHUNK = 256  # examples read in one call


def inspect(config: Mapping, *, data_dir: str | None = None, examples: int = 3, limit: int = 20_000) -> dict[str, Any]:
    """Open the data of a resolved config, which also fills its cache, and describe it.

    Args:
      config: a config that `sections.resolve` returned.
      data_dir: the data directory; `JAXMODELS_DATA_DIR` if None.
      examples: number of examples to show.
      limit: maximum number of examples of a split to read, spread evenly over it.

    Returns:
      JSON values: `source`, `seconds` to open it, `info`, `splits` (see `describe`), `examples` of train, `guesses`, `notes` and `fallbacks`.

    Raises:
      ConfigError: the data cannot be opened, or an example that is read is bad.
    """
    started = time.perf_counter()
    section = config["data"]
    shared = config_lib.fields(Loading) | config_lib.fields(EvaluationSets)
    options = {key: value for key, value in section.items() if key != "source" and key not in shared}
    with errors_of(f"config.data.source={section['source']!r}"):
        dataset = data_lib.open_dataset(section["source"], options, data_dir, sets=EvaluationSets.of(section).named())
    seconds = round(time.perf_counter() - started, 2)
    info = {key: list(value) if isinstance(value, tuple) else value for key, value in dataset.info.items() if key != "tokenizer"}
    first = "train" if "train" in dataset.splits else next(iter(dataset.splits))
    return {
        "source": section["source"],
        "seconds": seconds,
        "info": info,
        "splits": {name: describe(dataset, name, limit) for main in SPLITS for name in of(dataset.splits, main)},
        "examples": [readable(dataset, dataset.splits[first][i]) for i in range(min(examples, len(dataset.splits[first])))],
        "guesses": list(dataset.guesses),
        "notes": list(dataset.notes),
        "fallbacks": list(dataset.fallbacks),
    }


def describe(dataset: Dataset, split: str, limit: int) -> dict[str, Any]:
    """Return statistics of a split.

    Returns:
      `examples`, `read` (number of examples that the rest is computed from), `bytes` (of all, decoded), `arrays` (type and shape of each),
      `skipped`, and what the features of the arrays add: `labels` and `tags` (name -> count), `label` (numbers), `lengths` (tokens in an
      example), `unknown` (fraction of the tokens), `segments` (mean number in a row), `image` (per channel, in [0, 1]), `audio` (seconds).
    """
    source = dataset.splits[split]
    columns = _read(source, limit)
    read = len(next(iter(columns.values())))
    good = columns.pop("skipped", np.zeros(read)) == 0
    result = {
        "examples": len(source),
        "read": read,
        "bytes": round(sum(column.nbytes for column in columns.values()) / read * len(source)),
        "arrays": {name: f"{column.dtype} {list(column.shape[1:])}" for name, column in columns.items()},
        "skipped": dataset.skipped.get(split, 0) + int((~good).sum()),
    }
    if good.any():
        columns = {name: column[good] for name, column in columns.items()}
        for feature in dict.fromkeys(BY_ARRAY[name] for name in columns if name in BY_ARRAY):
            result |= feature.describe(columns, dataset.info)
    return result


def _read(source: DataSource, limit: int) -> dict[str, np.ndarray]:
    """Return at most `limit` examples, spread evenly; read in threads if they are decoded."""
    count = min(len(source), max(1, limit))
    indices = np.arange(count) * len(source) // count
    chunks = [indices[i : i + _CHUNK] for i in range(0, count, _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(1 if getattr(source, "in_memory", False) else 16) as pool:
        parts = list(pool.map(lambda chunk: get_batch(source, chunk), chunks))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def readable(dataset: Dataset, example: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the arrays of an example in readable form: texts decoded, labels by name, other arrays by shape and range."""
    result = {}
    for name in example:
        if name == "skipped":
            result |= {"left out": "it cannot be decoded"} if example[name] else {}
        elif (shown := BY_ARRAY.get(name, Feature).show(name, example, dataset.info)) is not None:
            result[name] = shown
    return result


def print_report(report: Mapping, console: Console) -> None:
    """Print a report of `inspect` as text."""
    console.print(f"[bold]{escape(report['source'])}[/], opened in {report['seconds']} s")
    for key, value in report["info"].items():
        if not isinstance(value, list) or len(value) <= 12:
            console.print(f"  {key}: {escape(str(value))}")
    for note in (*report["guesses"], *report["notes"], *(f"warning: {fallback}" for fallback in report["fallbacks"])):
        console.print(escape(note), style="yellow" if note.startswith("warning") else "dim")
    table = Table("split", "examples", "bytes", "left out", "arrays", box=None, header_style="dim")
    for name, split in report["splits"].items():
        arrays = ", ".join(f"{array} {form}" for array, form in split["arrays"].items())
        table.add_row(name, f"{split['examples']:,}", _bytes(split["bytes"]), f"{split['skipped']:,}", escape(arrays))
    console.print(table)
    for name, split in report["splits"].items():
        seen = "" if split["read"] == split["examples"] else f" (of {split['read']:,} examples spread evenly)"
        for key in ("labels", "tags", "box_labels"):
            if key in split:
                console.print(f"{name}: {key}{seen}: {escape(_balance(split[key]))}")
        for key in ("label", "image", "audio", "boxes"):
            if key in split:
                console.print(f"{name}: {key}{seen}: {escape(', '.join(f'{k} {v}' for k, v in split[key].items()))}")
        for key, lengths in split.get("lengths", {}).items():
            figures = ", ".join(f"{k} {lengths[k]:.6g}" for k in ("least", "mean", "median", "p95", "most"))
            console.print(f"{name}: length of {key}{seen}: {figures}; {lengths['full']:,} have the maximum length of {lengths['room']}")
            for line in _bars(lengths["histogram"]):
                console.print(line, highlight=False)
        if "unknown" in split:
            console.print(f"{name}: {split['unknown']:.3%} of the tokens are unknown")
        if "segments" in split:
            console.print(f"{name}: {split['segments']:.2f} segments in a row")
    for number, example in enumerate(report["examples"]):
        console.print(f"example {number}", style="dim")
        for key, value in example.items():
            console.print(f"  {key}: {escape(repr(value) if key in TEXTS else value)}", highlight=False)


def _balance(counts: Mapping[str, int]) -> str:
    """Return the most frequent names, with their fractions."""
    total = max(1, sum(counts.values()))
    most = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in most[:12])
    return shown + (f", … {len(most) - 12} more, the rarest {most[-1][0]} {most[-1][1]:,}" if len(most) > 12 else "")


def _bars(histogram: list[list[int]]) -> list[str]:
    """Return a line for each [from, to, count]."""
    most = max(count for *_, count in histogram)
    width = max(len(f"{a}-{b}") for a, b, _ in histogram)
    return [f"  {f'{a}-{b}' if a != b else a:>{width}} {count:>9,} {'#' * round(40 * count / most)}" for a, b, count in histogram]


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
