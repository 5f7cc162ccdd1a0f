"""Files with one example a row, read by an index of where each row starts."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.data import access
from jaxmodels.data.access import FileId
from jaxmodels.data.compressed import FRAME, Contents, Recorder, Stream
from jaxmodels.data.features.base import Row
from jaxmodels.data.groups import GroupCache
from jaxmodels.data.index import Opened, Writer, open_index
from jaxmodels.data.indexed import IndexedBase
from jaxmodels.data.text_lines import check_kind, csv_records
from jaxmodels.errors import ConfigError

_SPAN = 4 << 20  # bytes read at once where rows are read in order, and the most of a first record
_STARTS = 1 << 16  # records indexed at once
_LINES = 1 << 18  # bytes whose lines are found at once, which takes some 20 bytes for each

# (file and row, text of the row, folder of the file and its number, key -> column) -> row
Parse = Callable[[str, str, str, int, Mapping[str, Any]], Row]


class RecordRows(IndexedBase):
    """The rows of text files. Line breaks within a row, as CSV allows them, belong to it."""

    def __init__(self, opened: Opened, what: str, columns: Mapping[str, Any], parse: Parse, cache: GroupCache, unit: str):
        """
        Args:
          opened: index of `open_records`.
          what: the files in words.
          columns: key of the section -> column.
          parse: returns the row of a text.
          cache: of decompressed blocks.
          unit: `line` or `row`, for errors.
        """
        super().__init__(opened, what)
        self.columns, self.parse, self.unit = dict(columns), parse, unit
        self.contents = Contents(opened.index, cache)
        self.ends = np.array(opened.index.header["row_ends"], np.int64)
        self.first = opened.index.header["first_number"]
        if self.contents.has_blocks:
            self.group_ends = self._group_ends()
            starts = opened.index["block_start"]
            self.groups_that_fit = cache.limit // int(max(np.diff(starts).max(initial=1), 1)) if len(starts) else 0

    def __len__(self):
        return int(self.ends[-1])

    def notes(self):
        if "copies" in self.opened.index.arrays:
            size = len(self.opened.index["copies"])
            return (f"{self.what}: frames larger than {FRAME >> 20} MiB cannot be read from their middle; they are copied into the index, {size:,} bytes",)
        return ()

    def _group_ends(self) -> np.ndarray:
        """Return the number of rows that start before the end of each block; a file that is not compressed is one group."""
        result = []
        for file, end in enumerate(self.ends):
            first = int(self.ends[file - 1]) if file else 0
            blocks = self.contents.blocks(file)
            starts = self.opened.index["start"][first + file : int(end) + file]
            ends = self.opened.index["block_start"][blocks.start + 1 : blocks.stop] if blocks else [np.iinfo(np.int64).max]
            result.append(first + np.searchsorted(starts, ends, side="left"))
        return np.concatenate(result)

    def __getitem__(self, index: int) -> Row:
        file = int(np.searchsorted(self.ends, index, side="right"))
        start, stop = self.opened.index["start"][index + file : index + file + 2].tolist()
        return self._row(file, index, start, self.contents.read(file, start, stop), self.columns)

    def scan(self, columns):
        starts = self.opened.index["start"]
        for file, end in enumerate(self.ends.tolist()):
            row = int(self.ends[file - 1]) if file else 0
            while row < end:
                begin = int(starts[row + file])
                last = row + int(np.searchsorted(starts[row + 1 + file : end + 1 + file], begin + _SPAN, side="right"))
                last = max(last, row + 1)
                edges = starts[row + file : last + 1 + file].tolist()
                content = self.contents.read(file, begin, edges[-1])
                for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
                    yield self._row(file, row + i, start, content[start - begin : stop - begin], columns)
                row = last

    def _row(self, file: int, index: int, start: int, content: bytes, columns: Mapping[str, Any]) -> Row:
        before = int(self.ends[file - 1]) if file else 0
        first, last = np.searchsorted(self.opened.index["blank"], [before, index + 1]).tolist()
        number = index - before + last - first + self.first
        text = content.decode("utf-8" if start else "utf-8-sig", "surrogateescape")
        path = self.contents.files.path(file)
        return self.parse(f"{path}, {self.unit} {number}", text, self.contents.files.folders[file], file, columns)


def open_records(paths: Sequence[str], kind: str, header: bool, what: str) -> Opened:
    """Return the index of rows of some files.

    Args:
      paths: files, also compressed or remote.
      kind: `lines`, or `csv`: records of RFC 4180.
      header: whether the first record of each file names its columns and is no row.
      what: the files in words.

    Returns:
      An index with the array `start`, int64 [rows + files]: where each row starts, and each file's last row ends; and `blank`, int64: for each
      blank line that a row of its file follows, that row. Its header has `row_ends` (rows up to the end of each file), `first` (the text of
      each file's first record), `first_number`, `block_ends` and `crc32`.
    """

    def build(files: Sequence[FileId], writer: Writer) -> dict[str, Any]:
        recorder, rows, ends, first = Recorder(writer), 0, [], []
        for file in files:
            head, starts, blanks = bytearray(), [], []
            contents = _keeping(recorder.contents(file), head)
            count = 0
            for part, blank in _line_starts(contents) if kind == "lines" else _record_starts(contents, file.path):
                starts += part[: max(0, 2 - len(starts))].tolist()
                writer.append("start", part[max(0, header - count) :])  # the first record of a table with a header is no row
                blanks.append(blank)
                count += len(part)
            check_kind(bytes(head[:4]), file.path)
            if header and count == 1:
                raise ConfigError(f"{file.path}, line 1: the file is empty.")
            before = np.concatenate(blanks)
            writer.append("blank", rows + np.maximum(before[before < count - 1] - header, 0))
            rows += count - 1 - header
            ends.append(rows)
            first.append(bytes(head[starts[0] : starts[1]] if count > 1 else b"").decode("utf-8-sig", "surrogateescape"))
        return {"row_ends": ends, "first": first, "first_number": 1 + (header and kind == "lines"), "block_ends": recorder.block_ends, "crc32": recorder.crc32}

    return open_index("records", access.identify_all(paths), build, key=[kind, header], what=what)


def _keeping(contents: Iterable[bytes], head: bytearray) -> Iterator[bytes]:
    """Yield contents, and add their beginning to `head`."""
    for content in contents:
        if len(head) < _SPAN:
            head += content[:_SPAN]
        yield content


def _line_starts(contents: Iterable[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield where lines start that are not blank, and where the last one ends; and for each blank line, the number of those before it."""
    size, start, kept, filled = 0, 0, 0, 0  # `filled` bytes of the line at `start`, which is not over, are not blank
    none = np.zeros(0, np.int64)
    for content in (whole[place : place + _LINES] for whole in contents for place in range(0, len(whole), _LINES)):
        data = np.frombuffer(content, np.uint8)
        ends = np.flatnonzero(data == 10)
        filled_until = filled + np.cumsum((data != 10) & (data != 13) & (data != 32), dtype=np.int64)
        starts = np.concatenate([[start], ends + (size + 1)])
        in_line = np.diff(filled_until[ends], prepend=0) > 0 if len(ends) else np.zeros(0, bool)
        yield starts[:-1][in_line], kept + np.cumsum(in_line)[~in_line]
        kept, size = kept + int(in_line.sum()), size + len(content)
        start = int(starts[-1])
        filled = int(filled_until[-1] - (filled_until[ends[-1]] if len(ends) else 0))
    if filled:
        yield np.array([start], np.int64), none
    yield np.array([size], np.int64), none


def _record_starts(contents: Iterable[bytes], path: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, as `_line_starts`, where the records of RFC 4180 start; they are counted, not their lines. Latin-1 has one character for each byte."""
    size, start, none = 0, 0, np.zeros(0, np.int64)
    starts: list[int] = []

    def lines():
        nonlocal size
        for line in io.TextIOWrapper(io.BufferedReader(Stream(contents), _SPAN), encoding="latin-1", newline=""):
            size += len(line)
            yield line

    for _, fields in csv_records(lines(), path):
        if fields:
            starts.append(start)
        start = size
        if len(starts) >= _STARTS:
            yield np.array(starts, np.int64), none
            starts = []
    yield np.array([*starts, size], np.int64), none
