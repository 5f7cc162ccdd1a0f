"""Files with one word and its tag a line, and a blank line between sentences (CoNLL)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxmodels.data.features.base import Row
from jaxmodels.data.features.text import Tags
from jaxmodels.data.files import SplitFiles
from jaxmodels.data.keys import Keys, takes
from jaxmodels.data.rows import Holdout, open_rows
from jaxmodels.data.source import Untokenized
from jaxmodels.data.text_lines import is_blank, lines

_DOCUMENT = "-DOCSTART-"  # a separate line between documents


@dataclasses.dataclass(kw_only=True)
class Columns(Keys):
    """Keys of CoNLL files.

    Attributes:
      token_column, tag_column: numbers from 0, or from the end: -1 is the last.
    """

    token_column: int = 0
    tag_column: int = -1


@takes(Columns, Tags, SplitFiles, Holdout, without=("words_column", "tags_column"))
def conll(path: str, data_dir: str | None, **keys: Any) -> Untokenized:
    """Read sentences with a tag for each word: columns between tabs, or else between spaces; UTF-8.

    Args:
      path: as of `rows.tsv`, with the extension `.conll`, `.bio`, `.iob2` or `.txt`.
      data_dir: the data directory.

    Raises:
      ConfigError: no such file; with `on_bad_example='error'` also a bad line, by file and line.
    """
    tags = Tags.of(keys | {"words_column": "words", "tags_column": "tags"})
    options = Holdout.of(keys)
    files = SplitFiles.of(keys).find(path, data_dir, (".conll", ".bio", ".iob2", ".txt"))
    columns = keys["token_column"], keys["tag_column"]
    return open_rows(lambda: {split: [row for file in paths for row in _read(file, columns)] for split, paths in files.items()}, [tags], options, data_dir)


def _read(path: str, columns: tuple[int, int]) -> Iterator[Row]:
    """Yield a row for each sentence, with the columns `words` and `tags`. A bad line makes its whole sentence bad."""
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate(lines(path), 1):
        if not is_blank(line) and not line.startswith(_DOCUMENT):
            sentence.append((f"{path}, line {number}", line))
        elif sentence:
            yield _row(sentence, columns)
            sentence = []
    if sentence:
        yield _row(sentence, columns)


def _row(sentence: list[tuple[str, str]], columns: tuple[int, int]) -> Row:
    need = max(2, *(c + 1 if c >= 0 else -c for c in columns))
    words, tags = [], []
    for where, line in sentence:
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < need:
            return Row(where, problem=f"{len(fields)} of the {need} columns that a word and its tag need.")
        word, tag = (fields[column].strip() for column in columns)
        words.append(word)
        tags.append(tag)
    places = [where for where, _ in sentence]
    return Row(places[0], {"words": words, "tags": tags}, parts=places)
