"""What a data set holds: sizes, balance, lengths, and a few examples as people read them."""

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
from jaxmodels.data.loader import Loading
from jaxmodels.data.source import Dataset, DataSource, take

TEXTS = ("tokens", "source", "target")  # arrays of tokens, padded with -1
_CHUNK = 256  # examples read in one call
_BINS = 8
_SHOWN = 300  # characters of a text


def inspect(config: Mapping, *, data_dir: str | None = None, examples: int = 3, limit: int = 20_000) -> dict[str, Any]:
    """Opens the data of a resolved config, which makes what it caches, and describes it.

    Args:
      config: as `sections.resolve` gives.
      data_dir: the data directory; `JAXMODELS_DATA_DIR` if None.
      examples: how many to show.
      limit: at most so many examples of a split are read, spread evenly over it.

    Returns:
      What JSON can hold: `source`, `seconds` that opening took, `vocab_size` and the like, `splits` (see `describe`),
      `examples` of train, `notes` and `fallbacks`.

    Raises:
      ConfigError: the data cannot be opened, or an example that is read is bad.
    """
    started = time.perf_counter()
    section = config["data"]
    options = {key: value for key, value in section.items() if key != "source" and key not in config_lib.fields(Loading)}
    dataset = data_lib.open_dataset(section["source"], options, data_dir)
    seconds = round(time.perf_counter() - started, 2)
    info = {key: list(value) if isinstance(value, tuple) else value for key, value in dataset.info.items() if key != "tokenizer"}
    first = "train" if "train" in dataset.splits else next(iter(dataset.splits))
    return {
        "source": section["source"],
        "seconds": seconds,
        "info": info,
        "splits": {name: describe(dataset, name, limit) for name in data_lib.SPLITS if name in dataset.splits},
        "examples": [readable(dataset, dataset.splits[first][i]) for i in range(min(examples, len(dataset.splits[first])))],
        "notes": list(dataset.notes),
        "fallbacks": list(dataset.fallbacks),
    }


def describe(dataset: Dataset, split: str, limit: int) -> dict[str, Any]:
    """Figures of a split.

    Returns:
      `examples`, `read` (how many the rest is judged by), `bytes` (of all, decoded), `arrays` (type and shape of each), `skipped`, and of
      what there is: `labels` and `tags` (name -> count), `label` (numbers), `lengths` (tokens in an example), `unknown` (share of the
      tokens), `segments` (mean number in a row), `image` (per channel, in [0, 1]).
    """
    source = dataset.splits[split]
    columns = _read(source, limit)
    read = len(next(iter(columns.values())))
    kept = columns.pop("skipped", np.zeros(read)) == 0
    result = {
        "examples": len(source),
        "read": read,
        "bytes": round(sum(column.nbytes for column in columns.values()) / read * len(source)),
        "arrays": {name: f"{column.dtype} {list(column.shape[1:])}" for name, column in columns.items()},
        "skipped": dataset.skipped.get(split, 0) + int((~kept).sum()),
    }
    if not kept.any():
        return result
    columns = {name: column[kept] for name, column in columns.items()}
    if "label" in columns:
        result |= _labels(columns["label"], dataset.info)
    if "tags" in columns:
        result["tags"] = _counts(columns["tags"][columns["tags"] >= 0], dataset.info.get("tags"))
    texts = {name: columns[name] for name in TEXTS if name in columns}
    if texts:
        result["lengths"] = {name: _lengths(column) for name, column in texts.items()}
        unknown = dataset.info["tokenizer"].special("unknown") if "tokenizer" in dataset.info else None
        if unknown is not None:
            result["unknown"] = sum(int((c == unknown).sum()) for c in texts.values()) / max(1, sum(int((c >= 0).sum()) for c in texts.values()))
    if "segments" in columns and "tokens" in columns:
        result["segments"] = float(np.mean([len(np.unique(s[t >= 0])) for s, t in zip(columns["segments"], columns["tokens"], strict=True)]))
    if "image" in columns:
        result["image"] = _image(columns["image"])
    return result


def _read(source: DataSource, limit: int) -> dict[str, np.ndarray]:
    """At most `limit` examples, spread evenly; in threads where they are decoded."""
    count = min(len(source), max(1, limit))
    indices = np.arange(count) * len(source) // count
    chunks = [indices[i : i + _CHUNK] for i in range(0, count, _CHUNK)]
    with concurrent.futures.ThreadPoolExecutor(1 if getattr(source, "in_memory", False) else 16) as pool:
        parts = list(pool.map(lambda chunk: take(source, chunk), chunks))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _labels(column: np.ndarray, info: Mapping) -> dict[str, Any]:
    if column.dtype.kind in "iu":
        return {"labels": _counts(column, info.get("labels") or range(info.get("num_classes", 0)))}
    return {"label": {"least": float(column.min()), "mean": float(column.mean()), "deviation": float(column.std()), "most": float(column.max())}}


def _counts(numbers: np.ndarray, names) -> dict[str, int]:
    """Name -> how often, of every name."""
    names = list(names or range(int(numbers.max()) + 1))
    return {str(name): int(count) for name, count in zip(names, np.bincount(numbers.ravel(), minlength=len(names)), strict=True)}


def _lengths(column: np.ndarray) -> dict[str, Any]:
    """Of texts padded with -1: figures of their lengths, how many fill the whole row, and a histogram [[from, to, count], …]."""
    lengths = (column >= 0).sum(1)
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _BINS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return {
        "least": int(lengths.min()),
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "most": int(lengths.max()),
        "room": column.shape[1],
        "full": int((lengths == column.shape[1]).sum()),
        "histogram": [[int(a), int(b) - 1, int(n)] for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)],
    }


def _image(column: np.ndarray) -> dict[str, list[float]]:
    """Mean and deviation of each channel; of whole numbers in [0, 1]."""
    scale = 255 if column.dtype == np.uint8 else 1
    axes = tuple(range(column.ndim - 1))
    mean = column.mean(axes, dtype=np.float64)
    square = np.zeros_like(mean)
    for part in np.array_split(column, max(1, len(column) // _CHUNK)):  # as float64, all images at once could be more than fits
        square += np.square(part - mean).sum(axes)
    deviation = np.sqrt(square / (column.size / column.shape[-1]))
    return {"mean": (mean / scale).round(4).tolist(), "deviation": (deviation / scale).round(4).tolist()}


def readable(dataset: Dataset, example: Mapping[str, np.ndarray]) -> dict[str, str]:
    """An example in words: texts decoded, tags beside their words, labels by name, other arrays by shape and range."""
    tokenizer, result = dataset.info.get("tokenizer"), {}
    for name, value in example.items():
        value = np.asarray(value)
        if name == "skipped":
            result |= {"left out": "it cannot be decoded"} if value else {}
        elif name in TEXTS and tokenizer is not None:
            result[name] = _text(tokenizer, value, example.get("segments") if name == "tokens" else None)
        elif name == "counts" and tokenizer is not None:
            result[name] = _learned(tokenizer, np.asarray(example["tokens"]), value)
        elif name == "tags" and "tags" in dataset.info and tokenizer is not None:
            result[name] = _tagged(tokenizer, np.asarray(example["tokens"]), value, dataset.info["tags"])
        elif name == "label" and value.dtype.kind in "iu" and dataset.info.get("labels"):
            result[name] = str(dataset.info["labels"][int(value)])
        elif value.ndim == 0:
            result[name] = f"{value:.6g}" if value.dtype.kind == "f" else str(value)
        elif name not in ("segments", "tags", "counts"):
            result[name] = f"{value.dtype} {list(value.shape)} from {value.min():.6g} to {value.max():.6g}"
    return result


def _text(tokenizer, tokens: np.ndarray, segments: np.ndarray | None) -> str:
    """A text; the segments of a packed row with a bar between."""
    if segments is None:
        return _shortened(tokenizer.decode(tokens[tokens >= 0]))
    parts = [tokenizer.decode(tokens[(segments == s) & (tokens >= 0)]) for s in np.unique(segments[tokens >= 0])]
    return _shortened(" | ".join(parts))


def _tagged(tokenizer, tokens: np.ndarray, tags: np.ndarray, names) -> str:
    """`word/TAG word/TAG`: a word is the tokens from its tag on to the next."""
    starts = np.flatnonzero(tags >= 0)
    ends = [*starts[1:], int((tokens >= 0).sum())]
    return _shortened(" ".join(f"{tokenizer.decode(tokens[a:b]).strip()}/{names[tags[a]]}" for a, b in zip(starts, ends, strict=True)))


def _learned(tokenizer, tokens: np.ndarray, counts: np.ndarray) -> str:
    """The parts of a row that are to be learned."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts, [0]]))).reshape(-1, 2)
    return _shortened(" | ".join(tokenizer.decode(tokens[start:stop]) for start, stop in edges))


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def print_report(report: Mapping, console: Console) -> None:
    """The same for people."""
    console.print(f"[bold]{escape(report['source'])}[/], opened in {report['seconds']} s")
    for key, value in report["info"].items():
        if not isinstance(value, list) or len(value) <= 12:
            console.print(f"  {key}: {escape(str(value))}")
    for note in (*report["notes"], *(f"warning: {fallback}" for fallback in report["fallbacks"])):
        console.print(escape(note), style="yellow" if note.startswith("warning") else "dim")
    table = Table("split", "examples", "bytes", "left out", "arrays", box=None, header_style="dim")
    for name, split in report["splits"].items():
        arrays = ", ".join(f"{array} {form}" for array, form in split["arrays"].items())
        table.add_row(name, f"{split['examples']:,}", _bytes(split["bytes"]), f"{split['skipped']:,}", escape(arrays))
    console.print(table)
    for name, split in report["splits"].items():
        seen = "" if split["read"] == split["examples"] else f" (of {split['read']:,} examples spread evenly)"
        for key in ("labels", "tags"):
            if key in split:
                console.print(f"{name}: {key}{seen}: {escape(_balance(split[key]))}")
        for key in ("label", "image"):
            if key in split:
                console.print(f"{name}: {key}{seen}: {escape(', '.join(f'{k} {v}' for k, v in split[key].items()))}")
        for key, lengths in split.get("lengths", {}).items():
            figures = ", ".join(f"{k} {lengths[k]:.6g}" for k in ("least", "mean", "median", "p95", "most"))
            console.print(f"{name}: length of {key}{seen}: {figures}; {lengths['full']:,} fill all {lengths['room']}")
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
    """The most frequent ones, with their shares."""
    total = max(1, sum(counts.values()))
    most = sorted(counts.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in most[:12])
    return shown + (f", … {len(most) - 12} more, the rarest {most[-1][0]} {most[-1][1]:,}" if len(most) > 12 else "")


def _bars(histogram: list[list[int]]) -> list[str]:
    """A line for each [from, to, count]."""
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
