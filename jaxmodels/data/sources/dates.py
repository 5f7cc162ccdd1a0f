"""Dates as people write them, and in ISO 8601: pairs of texts whose right answer is known, for sequence to sequence."""

import calendar
import datetime
from collections.abc import Callable, Mapping

import numpy as np

from jaxmodels.data.features.base import padded
from jaxmodels.data.features.text import start_and_end
from jaxmodels.data.source import Arrays, Dataset, Untokenized
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer, frame
from jaxmodels.tokenizers.factory import make_tokenizer

FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII")


def _month(day: datetime.date) -> str:
    return calendar.month_name[day.month]


def _short(day: datetime.date) -> str:
    return calendar.month_abbr[day.month]


def _weekday(day: datetime.date) -> str:
    return calendar.day_name[day.weekday()]


def _ordinal(number: int) -> str:
    ending = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


FORMATS: tuple[Callable[[datetime.date], str], ...] = (
    lambda d: f"{_month(d)} {d.day}, {d.year}",
    lambda d: f"{d.day} {_month(d)} {d.year}",
    lambda d: f"{_short(d)} {d.day}, {d.year}",
    lambda d: f"{d.day}-{_short(d)}-{d.year}",
    lambda d: f"{_weekday(d)}, {_month(d)} {d.day}, {d.year}",
    lambda d: f"{_weekday(d)[:3]} {d.day} {_short(d)} {d.year}",
    lambda d: f"the {_ordinal(d.day)} of {_month(d)} {d.year}",
    lambda d: f"{_month(d)} the {_ordinal(d.day)}, {d.year}",
    lambda d: f"{_short(d).upper()} {d.day} {d.year}",
    lambda d: f"{d.year} {_month(d).lower()} {d.day}",
    lambda d: f"{d.month}/{d.day}/{d.year}",  # with slashes the month comes first, with points the day
    lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d: f"{d.day}.{_ROMAN[d.month - 1]}.{d.year}",
    lambda d: f"{d.year}/{d.month:02}/{d.day:02}",
)


def dates(data_dir: str | None, *, examples: int = 20000, held_out: int = 2000, tokenizer: str = "character+special") -> Untokenized:
    """Make up days from 1900 to 2099, each in one of `FORMATS`, to be written as `1998-03-05`; always the same.

    No day of the validation or test split is in another split, in any form. Names of months and weekdays are those of
    Python's calendar, in English unless the program has set another locale.

    Examples: `source` int32 [S], `target` int32 [U + 1] (`<start>`, the text, `<end>`), padded with -1.

    Args:
      data_dir: where a tokenizer's file may be.
      examples: examples of the train split; days are drawn anew for each, so some occur twice.
      held_out: examples of the validation split, and of the test split.
      tokenizer: specification of a tokenizer with start and end tokens (see `tokenizers.factory.make_tokenizer`).
    """
    days = (LAST - FIRST).days + 1
    if examples < 1 or not 0 < held_out < days // 2:
        raise ConfigError(f"config.data: examples must be at least 1, and held_out between 1 and {days // 2 - 1}; got {examples}, {held_out}.")
    # Raw bits of a bit generator are the same in every numpy version; its distributions need not be.
    bits = np.random.PCG64(0)
    order = np.argsort(bits.random_raw(days), kind="stable")
    test, validation, train = np.split(order, [held_out, 2 * held_out])
    train = train[bits.random_raw(examples) % np.uint64(len(train))]
    pairs = {}
    for split, numbers in {"train": train, "validation": validation, "test": test}.items():
        forms = (bits.random_raw(len(numbers)) % np.uint64(len(FORMATS))).tolist()
        chosen = [FIRST + datetime.timedelta(days=int(number)) for number in numbers]
        pairs[split] = [(FORMATS[form](day), day.isoformat()) for form, day in zip(forms, chosen, strict=True)]

    def texts():
        return (text for pair in pairs["train"] for text in pair)

    return Untokenized(tokenizer, texts, lambda spec: _tokenized(pairs, make_tokenizer(spec, texts(), data_dir), spec))


def _tokenized(pairs: Mapping[str, list[tuple[str, str]]], coder: Tokenizer, spec: str | Tokenizer) -> Dataset:
    """Return the data set of pairs, whose arrays are as long as the longest."""
    start, end = start_and_end(coder, spec)
    before, after = frame(coder)
    sources = {split: [[*before, *coder.encode(source), *after] for source, _ in part] for split, part in pairs.items()}
    targets = {split: [[start, *coder.encode(target), end] for _, target in part] for split, part in pairs.items()}
    widths = [max(len(row) for rows in part.values() for row in rows) for part in (sources, targets)]
    splits = {split: Arrays({"source": _stack(sources[split], widths[0]), "target": _stack(targets[split], widths[1])}) for split in pairs}
    return Dataset(splits, {"vocab_size": coder.vocab_size, "tokenizer": coder, "target_length": widths[1] - 1})


def _stack(rows: list[list[int]], width: int) -> np.ndarray:
    """Return int32 [rows, width], padded with -1."""
    return np.stack([padded(np.array(row), width) for row in rows])
