"""Files with one word and its tag a line, and a blank line between sentences (CoNLL)."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jaxmodels.data import copies, encoded
from jaxmodels.data.features.base import Row
from jaxmodels.data.features.text import Tags
from jaxmodels.data.files import SplitFiles
from jaxmodels.data.guesses import guess
from jaxmodels.data.keys import Keys, takes
from jaxmodels.data.rows import Holdout, open_rows
from jaxmodels.data.source import Untokenized
from jaxmodels.data.text_lines import is_blank, lines

_DOCUMENT = "-DOCSTART-"  # a separate line between documents


@dataclasses.dataclass(kw_only=True)
class Columns(Keys):
    """Keys of CoNLL files.

    Attributes:
      token_column, tag_column: numbers from 0, or from the end: -1 is the last. By default the first and the last; in CoNLL-U the form, 1, and the
        universal part of speech, 3.
    """

    token_column: int | None = None
    tag_column: int | None = None


@takes(Columns, Tags, SplitFiles, Holdout, without=("words_column", "tags_column"))
def conll(path: str, data_dir: str | None, **keys: Any) -> Untokenized:
    """Read sentences with a tag for each word: columns between tabs, or else between spaces; UTF-8.

    In CoNLL-U, files of ten columns whose first one numbers the words, comments, words that a file joins (`3-4`) and words that are not in the
    text (`5.1`) are no words. In other files `-DOCSTART-` is none.

    Args:
      path: as of `rows.tsv`, with the extension `.conll`, `.conllu`, `.bio`, `.iob2` or `.txt`.
      data_dir: the data directory.

    Raises:
      ConfigError: no such file; with `on_bad_example='error'` also a bad line, by file and line.
    """
    tags = Tags.of(keys | {"words_column": "words", "tags_column": "tags"})
    options = Holdout.of(keys)
    files = SplitFiles.of(keys).find(path, data_dir, (".conll", ".conllu", ".bio", ".iob2", ".txt"))
    copies.keep([file for paths in files.values() for file in paths])
    columns = keys["token_column"], keys["tag_column"]

    def rows():
        return {split: [row for file in paths for row in _read(file, columns)] for split, paths in files.items()}

    kept = encoded.is_worth_it([file for part in files.values() for file in part])
    identity = (lambda: ["conll", columns, encoded.contents(files)]) if kept else None
    return open_rows(rows, [tags], options, data_dir, identity=identity, what=path)


def _read(path: str, columns: tuple[int | None, int | None]) -> Iterator[Row]:
    """Yield a row for each sentence, with the columns `words` and `tags`. A bad line makes its whole sentence bad."""
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines(path), 1)]
    universal = _is_universal(line for _, line in numbered)
    if universal and None in columns:
        guess(f"{path} is CoNLL-U: words are column 1, tags are column {3 if columns[1] is None else columns[1]} (data.token_column, data.tag_column)")
    token, tag = (given if given is not None else usual for given, usual in zip(columns, (1, 3) if universal else (0, -1), strict=True))
    sentence: list[tuple[str, str]] = []
    for where, line in [*numbered, ("", "")]:
        if is_blank(line) or line.startswith(_DOCUMENT):
            if sentence:
                yield _row(sentence, (token, tag))
            sentence = []
        elif not (universal and (line.startswith("#") or re.match(r"\d+[-.]\d+\t", line))):
            sentence.append((where, line))


def _is_universal(text: Iterable[str]) -> bool:
    """Return whether the first word of a file is one of CoNLL-U: ten columns between tabs, the first of them a number."""
    first = next((line for line in text if not is_blank(line) and not line.startswith("#")), "")
    return first.count("\t") == 9 and re.match(r"\d+([-.]\d+)?\t", first) is not None


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
