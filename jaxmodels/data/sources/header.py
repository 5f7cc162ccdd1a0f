"""Whether the first line of a table names its columns, where no key says it."""

import itertools
from collections.abc import Callable, Mapping, Sequence

from jaxmodels.data.features.base import Column
from jaxmodels.data.guesses import guess
from jaxmodels.data.text_lines import is_number
from jaxmodels.errors import ConfigError

_NAMES = {"text", "label", "sentence", "sentence1", "sentence2", "class", "category", "target", "id", "idx", "index", "title", "body", "content", "comment"}
_NAMES |= {"review", "tweet", "message", "question", "answer", "document", "premise", "hypothesis", "score", "rating", "sentiment", "source", "date", "url"}
_LOOKED_AT = 1000  # rows


def find_header(records: Callable, paths: Sequence[str], columns: Mapping[str, Column]) -> bool:
    """Return whether the first line of each of some tables names its columns, by what it has and what the lines after it have.

    Args:
      records: path -> records.
      paths: the tables.
      columns: key of the section -> column.

    Raises:
      ConfigError: it cannot be seen, or the tables differ.
    """
    if any(isinstance(column, str) for column in columns.values()):
        return True
    label = columns.get("label_column")
    found = {path: _has_header(list(itertools.islice(records(path), _LOOKED_AT)), label, path) for path in paths}
    if len(set(found.values())) > 1:
        one, other = (next(path for path, has in found.items() if has is value) for value in (True, False))
        raise ConfigError(f"config.data.header: the first line of {one} seems to name columns, that of {other} does not. Set data.header.")
    if any(found.values()):
        guess(f"the first line of {next(iter(found))} names its columns (data.header=false if it is a row)")
    return any(found.values())


def _has_header(table: list[tuple[int, list[str] | str]], label: int | None, path: str) -> bool:
    rows = [fields for _, fields in table if not isinstance(fields, str)]
    if len(rows) < 2 or (label is not None and not label < min(map(len, rows))):
        return False
    first, rest = rows[0], rows[1:]
    usual = sum(name.strip().lower() in _NAMES for name in first) * 2 >= len(first) and len(set(first)) == len(first)
    if label is None:
        return usual
    name, others = first[label].strip(), [fields[label].strip() for fields in rest]
    if name in others:
        return False
    numbers = all(is_number(value) for value in others)
    if usual or (numbers and not is_number(name)):
        return True
    # A class that only the first row has, where every other class has several rows, may be a name of a column.
    if not numbers and len(rest) >= 10 and all(others.count(value) > 1 for value in set(others)):
        raise ConfigError(f"{path}, line 1: {name!r} is the label of no other line. Is it the name of the column? Set data.header=true or data.header=false.")
    return False
