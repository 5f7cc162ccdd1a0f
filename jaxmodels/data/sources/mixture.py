"""Several sources as one, in given proportions."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import guesses
from jaxmodels.data import registry as data_lib
from jaxmodels.data.evaluation_sets import KEYS
from jaxmodels.data.source import Dataset, DataSource, Untokenized, fingerprint, get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer
from jaxmodels.tokenizers.factory import is_trained, make_tokenizer

PERIOD = 10_000  # examples after which the order of parts repeats: the resolution of weights


def mixture(data_dir: str | None, given: Mapping | None, *, sources: Mapping[str, Any], tokenizer: str = "character") -> Dataset | Untokenized:
    """Mix examples of several sources of one kind.

    An epoch lasts until every part has been seen whole; parts that are small for their weight repeat.
    Validation and test splits are those of the parts one after the other, each example once.

    Args:
      data_dir: the data directory.
      given: arrays by split, for a part `arrays`.
      sources: name -> `{"source": …, "weight": …}` and the source's own keys except `tokenizer`. Weights are relative shares of the
        training examples, 1 by default.
      tokenizer: specification of the tokenizer of all parts that have one (see `tokenizers.factory.make_tokenizer`); trained on the
        training texts of all of them.

    Raises:
      ConfigError: of a part, by its key; the parts differ in kind; a weight is not above 0, or too small.
    """
    parts = resolve_parts(sources, "data.sources")

    def training_texts() -> Iterator[str]:
        texts = (_training_texts(name, part, tokenizer, data_dir, given) for name, part in parts.items() if _takes_tokenizer(part))
        return itertools.chain.from_iterable(list(texts))

    def tokenize(spec: str | Tokenizer) -> Dataset:
        coder = make_tokenizer(spec, training_texts() if is_trained(spec) else (), data_dir)
        return _mixed(parts, {name: _open_part(name, part, coder, data_dir, given) for name, part in parts.items()})

    if not any(_takes_tokenizer(part) for part in parts.values()):
        return _mixed(parts, {name: _open_part(name, part, None, data_dir, given) for name, part in parts.items()})
    return Untokenized(tokenizer, training_texts, tokenize)


def _mixed(parts: Mapping[str, Mapping], datasets: Mapping[str, Dataset]) -> Dataset:
    """Return the data set of the opened parts."""
    untrained = [name for name, dataset in datasets.items() if "train" not in dataset.splits]
    if untrained:
        raise ConfigError(f"config.data.sources.{untrained[0]}: {parts[untrained[0]]['source']!r} has no train split.")
    _check_alike(datasets)
    train = Mixture([dataset.splits["train"] for dataset in datasets.values()], [parts[name]["weight"] for name in datasets], names=tuple(datasets))
    splits = {"train": train}
    for split in ("validation", "test"):
        found = {name: dataset.splits[split] for name, dataset in datasets.items() if split in dataset.splits}
        splits |= {split: Concatenation(list(found.values()), names=tuple(found))} if found else {}
    counted = zip(datasets, train.counts, train.parts, strict=True)
    shares = ", ".join(f"{name} {count / len(train):.1%} ({count / len(part):.2f} times each)" for name, count, part in counted)
    notes = [f"{name}: {note}" for name, dataset in datasets.items() for note in dataset.notes]
    skipped = {split: sum(dataset.skipped.get(split, 0) for dataset in datasets.values()) for split in splits}
    return Dataset(
        splits,
        next(iter(datasets.values())).info,
        notes=(*notes, f"an epoch of the mixture is {len(train):,} examples: {shares}"),
        fallbacks=tuple(f"{name}: {text}" for name, dataset in datasets.items() for text in dataset.fallbacks),
        guesses=tuple(f"{name}: {text}" for name, dataset in datasets.items() for text in dataset.guesses),
        skipped={split: count for split, count in skipped.items() if count},
    )


def resolve_parts(sources: Mapping[str, Any], where: str) -> dict[str, dict]:
    """Return the parts of a mixture with all keys, types checked.

    Args:
      sources: the section of a config.
      where: its dotted name, for errors.
    """
    if not sources:
        raise ConfigError(f"config.{where}: a mixture needs parts: {{'NAME': {{'source': …, 'weight': …}}}}.")
    parts = {}
    for name, part in sorted(sources.items()):  # a fixed order, whatever the order in a file or JSON
        part = {"source": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping) or "source" not in part:
            raise ConfigError(f"config.{where}.{name}.source is required, e.g. --config.{where}.{name}.source=VALUE.")
        if "tokenizer" in part:
            above = where.removesuffix("sources")
            raise ConfigError(f"config.{where}.{name}.tokenizer: the parts of a mixture share one; set config.{above}tokenizer.")
        parts[name] = data_lib.resolve_source(part, {"weight": (float, 1.0)}, f"{where}.{name}", without=("tokenizer", *KEYS.values()))
        if not 0 < parts[name]["weight"] < float("inf"):
            raise ConfigError(f"config.{where}.{name}.weight must be above 0, got {parts[name]['weight']}.")
    least = min(parts, key=lambda name: parts[name]["weight"])
    if parts[least]["weight"] * PERIOD < sum(part["weight"] for part in parts.values()):
        raise ConfigError(f"config.{where}.{least}.weight is less than one example in {PERIOD:,}: leave the part out, or give it more.")
    return parts


mixture.resolve = lambda section, where: {"sources": resolve_parts(section["sources"], f"{where}.sources")}  # called by registry.resolve_source


def _takes_tokenizer(part: Mapping) -> bool:
    return "tokenizer" in config_lib.fields(data_lib.find(part["source"])[0])


def _training_texts(name: str, part: Mapping, spec: str, data_dir: str | None, given: Mapping | None) -> Iterable[str]:
    """Return the texts of a part that the mixture's tokenizer is trained on."""
    with _as_part(name), guesses.collected():  # made again, and recorded, when the part is opened for its examples
        opened = data_lib.open_source(part["source"], _options(part) | {"tokenizer": spec}, data_dir, given)
        if not isinstance(opened, Untokenized):
            raise ConfigError(
                f"config.data.source: {part['source']!r} gives no texts to train data.tokenizer={spec!r} on; "
                "return a jaxmodels.data.source.Untokenized, or set a tokenizer that is not trained."
            )
        return opened.training_texts()


def _open_part(name: str, part: Mapping, tokenizer: Tokenizer | None, data_dir: str | None, given: Mapping | None) -> Dataset:
    options = _options(part) | ({"tokenizer": tokenizer} if _takes_tokenizer(part) else {})
    with _as_part(name):
        return data_lib.open_dataset(part["source"], options, data_dir, given)


def _options(part: Mapping) -> dict[str, Any]:
    """Return the keys of a part that are its source's own."""
    return {key: value for key, value in part.items() if key not in ("source", "weight")}


@contextlib.contextmanager
def _as_part(name: str):
    """Rename the keys in a source's errors to their names in the mixture."""
    try:
        yield
    except ConfigError as error:
        here, message = f"config.data.sources.{name}", str(error)
        if message.startswith("config.data.tokenizer"):
            raise
        message = message.replace("config.data", here, 1) if message.startswith("config.data") else f"{here}: {message}"
        raise ConfigError(message) from error


def _check_alike(datasets: Mapping[str, Dataset]) -> None:
    """Raise ConfigError unless the parts have the same arrays and the same `info`."""
    names = list(datasets)
    first = datasets[names[0]]
    for name in names[1:]:
        for key in first.info.keys() | datasets[name].info.keys():
            one, other = first.info.get(key), datasets[name].info.get(key)
            if key == "tokenizer" and one is not None and other is not None:
                one, other = one.to_json(), other.to_json()  # a tokenizer read from the cache is another object
            if one is not other and not np.array_equal(np.asarray(one), np.asarray(other)):
                both = f"{key} is {one} in {names[0]!r} and {other} in {name!r}"
                raise ConfigError(f"config.data.sources: {both}; the parts of a mixture must be of one kind.")
    kinds = {}
    for name, dataset in datasets.items():
        for split, source in dataset.splits.items():
            kind = {key: (np.shape(value), str(np.asarray(value).dtype)) for key, value in source[0].items()}
            kinds.setdefault(str(sorted(kind.items())), f"{kind} in {split} of {name!r}")
    if len(kinds) > 1:
        raise ConfigError(f"config.data.sources: examples are {' and '.join(list(kinds.values())[:2])}; the parts of a mixture must have the same arrays.")


class _Joined:
    """Several sources as one. A subclass defines `locate(indices)`: the part and the example in it, two int [n]."""

    def __init__(self, parts: Sequence[DataSource], names: Sequence[str] = ()):
        """
        Args:
          parts: at least one.
          names: of the parts, for errors.
        """
        self.parts, self.names = list(parts), tuple(names)
        self.sizes = np.array([len(part) for part in parts])
        self.in_memory = all(getattr(part, "in_memory", False) for part in parts)

    def fingerprint(self):
        own = [part.fingerprint() if hasattr(part, "fingerprint") else 0 for part in self.parts]
        return fingerprint(self.sizes, np.array(own), np.array([len(self)]))

    def __getitem__(self, index):
        part, example = self.locate(np.array([index]))
        return self.parts[part[0]][int(example[0])]

    def get_batch(self, indices):
        which, examples = self.locate(np.asarray(indices))
        result = {}
        for number in np.unique(which):
            here = which == number
            for key, values in get_batch(self.parts[number], examples[here]).items():
                if key not in result:
                    result[key] = np.empty((len(which), *values.shape[1:]), values.dtype)
                result[key][here] = values
        return result


class Concatenation(_Joined):
    """Parts one after the other."""

    def __len__(self):
        return int(self.sizes.sum())

    def locate(self, indices):
        """Return the parts of examples and their indices in them, both int [n]."""
        ends = np.cumsum(self.sizes)
        which = np.searchsorted(ends, indices, side="right")
        return which, indices - (ends - self.sizes)[which]


class Mixture(_Joined):
    """Parts interleaved by weight, as evenly as possible: each part has its share of any run of consecutive examples.

    The positions of each part in a period are computed once, so that `locate` needs no search. The mixture ends when every part has
    been seen whole; parts that end earlier start again.
    """

    def __init__(self, parts: Sequence[DataSource], weights: Sequence[float], names: Sequence[str] = ()):
        """
        Args:
          parts: at least one.
          weights: relative, each above 0.
          names: of the parts, for errors.
        """
        super().__init__(parts, names)
        exact = np.array(weights, np.float64) / np.sum(weights) * PERIOD
        self.quotas = np.maximum(np.floor(exact).astype(np.int64), 1)
        for number in np.argsort(np.floor(exact) - exact, kind="stable")[: max(0, PERIOD - self.quotas.sum())]:
            self.quotas[number] += 1
        self.period = int(self.quotas.sum())
        which = np.repeat(np.arange(len(self.quotas)), self.quotas)
        ranks = np.concatenate([np.arange(quota) for quota in self.quotas])
        due = (ranks + 0.5) / self.quotas[which]
        order = np.lexsort((which, due))
        self.which, self.ranks = which[order], ranks[order]
        # The position of the first occurrence of each part's last example.
        turns, rest = np.divmod(self.sizes - 1, self.quotas)
        places = [np.flatnonzero(self.which == number)[r] for number, r in enumerate(rest)]
        self.size = int(max(turns * self.period + np.array(places))) + 1

    def __len__(self):
        return self.size

    @property
    def counts(self) -> list[int]:
        """Number of examples of each part in an epoch."""
        turns, rest = divmod(self.size, self.period)
        return (turns * self.quotas + np.bincount(self.which[:rest], minlength=len(self.quotas))).tolist()

    def locate(self, indices):
        """Return the parts of examples and their indices in them, both int [n], without a search."""
        turns, rest = np.divmod(indices, self.period)
        which = self.which[rest]
        return which, (turns * self.quotas[which] + self.ranks[rest]) % self.sizes[which]
