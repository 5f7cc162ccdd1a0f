"""Documents from files, checked once, and divided where a fraction of them validates."""

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from jaxmodels.data.compressed import SUFFIXES, open_stream
from jaxmodels.data.skipping import Skipping
from jaxmodels.data.sources.rows import read_jsonl
from jaxmodels.data.tokens import Piece
from jaxmodels.tokenizers.base import safe_cut

_PART = 1 << 22  # bytes of a part of a long file

JSON_LINES = tuple(name + suffix for name in (".jsonl", ".ndjson") for suffix in ("", *SUFFIXES))


@dataclasses.dataclass(frozen=True)
class Document:
    """A document of a file, or a part of a long one.

    Attributes:
      where: file, and line if the file has several documents.
      text: the document's text.
      problem: why the document cannot be used, or None.
      whole: whether it ends where the document ends.
    """

    where: str
    text: str = ""
    problem: str | None = None
    whole: bool = True


def read_documents(files: Sequence[str], text_column: str) -> Iterator[Document]:
    """Yield each file as a document, a long one in parts between words; of files of JSON lines, the text of each line."""
    for path in files:
        if path.endswith(JSON_LINES):
            for row in read_jsonl(path, {"text_column": text_column}):
                yield _checked(row.where, row.values.get(text_column, ""), row.problem)
        else:
            yield from _read_text(path)


def _read_text(path: str) -> Iterator[Document]:
    """Yield the text of a file. Of a long one, bytes that are not UTF-8 are found before any part of it is used."""
    with open_stream(path) as file:
        content = file.read(_PART)
        long = bool(file.peek(1))
    if not long or not _is_utf8(path):
        with open_stream(path) as file:
            content = file.read() if long else content
        try:
            yield _checked(path, content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield Document(path, problem=f"not UTF-8 text: byte {error.start}: {error.reason}.")
        return
    text = ""
    for part in _decoded(path):
        start, text = max(0, len(text) - 2), text + part  # a cut may need characters of both
        cut = safe_cut(text, start) if start else None
        if cut is not None:
            yield dataclasses.replace(_checked(path, text[:cut]), whole=False)
            text = text[cut:]
    yield _checked(path, text)


def _decoded(path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_stream(path) as file:
        while content := file.read(_PART):
            yield decoder.decode(content)
    yield decoder.decode(b"", final=True)


def _is_utf8(path: str) -> bool:
    try:
        for _ in _decoded(path):
            pass
    except UnicodeDecodeError:
        return False
    return True


def _checked(where: str, text="", problem: str | None = None) -> Document:
    if problem is None:
        problem = _problem(text)
    return Document(where, text) if problem is None else Document(where, problem=problem)


def _problem(text) -> str | None:
    if not isinstance(text, str):
        return f"the text is {text!r}, not a string."
    if not text or text.isspace():
        return "the text is empty."
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the text is not UTF-8."
    return None


class Corpus:
    """The usable documents of one split; may be iterated over repeatedly."""

    def __init__(self, documents: Callable[[], Iterable[Document]], start: int = 0, stop: int | None = None):
        """
        Args:
          documents: function that reads the documents.
          start, stop: range of characters of the split, counted over all documents.
        """
        self.documents, self.start, self.stop = documents, start, stop

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """Yield the texts; a document at the boundary of two splits has a part in each."""
        position = 0
        for document in self.documents():
            if document.problem is not None:
                continue
            first, position = position, position + len(document.text)
            if self.stop is not None and first >= self.stop:
                return
            begin, end = max(self.start - first, 0), len(document.text) if self.stop is None else min(self.stop - first, len(document.text))
            if begin < end:
                yield Piece(document.where, document.text[begin:end], document.whole and end == len(document.text))


def survey(documents: Mapping[str, Callable[[], Iterable[Document]]], holdout: float, skipping: Skipping) -> dict[str, Corpus]:
    """Read all documents once, and divide them into splits.

    Args:
      documents: split -> function that reads its documents.
      holdout: fraction of the training characters, at their end, that validates if no documents do; 0 for none.
      skipping: policy for documents that cannot be used.

    Raises:
      ConfigError: a bad document, unless `skipping` allows it; or a split is empty.
    """
    corpora = {}
    for split, read in documents.items():
        characters = 0
        for document in read():
            if document.problem is not None:
                skipping.bad(split, document.where, document.problem)
            characters += len(document.text)
        skipping.check_rest(split, characters)
        corpora[split] = Corpus(read)
        if split == "train" and holdout and "validation" not in documents:
            cut = int(characters * (1 - holdout))
            corpora |= {"train": Corpus(read, 0, cut), "validation": Corpus(read, cut)}
    return corpora
