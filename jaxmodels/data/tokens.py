"""Tokenized text, in memory or in a cache on disk that is memory-mapped.

The cache is the folder `JAXMODELS_CACHE_DIR`, by default `~/.cache/jaxmodels`. An entry is a folder named by a checksum of its
inputs: `header.json`, `tokenizer.json`, and for each split its tokens and the ends of its documents.
"""

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.data import cache
from jaxmodels.errors import ConfigError
from jaxmodels.storage.paths import cache_folder
from jaxmodels.tokenizers.base import Tokenizer, encode_all
from jaxmodels.tokenizers.factory import from_json

VERSION = 2
IN_MEMORY = 1 << 30  # bytes of files that the page cache holds
_TOGETHER = 1 << 20  # characters encoded at once


class Piece(NamedTuple):
    """A document, or a part of one.

    Attributes:
      where: file, and line if the file has several documents.
      text: text of the piece.
      whole: whether it ends where the document ends.
    """

    where: str
    text: str
    whole: bool


Texts = Mapping[str, Callable[[], Iterable[Piece]]]  # split -> function that reads its texts, called repeatedly


class Tokens:
    """Tokens by index, as int32, in memory or in a mapped file."""

    def __init__(self, values: np.ndarray, *, path: str | os.PathLike | None = None, checksum: int | None = None):
        """
        Args:
          values: int [n], of any width.
          path: file that `values` is mapped from, or None.
          checksum: CRC-32 of the values, if known.
        """
        self.values, self.path, self.checksum = values, path, checksum

    def __len__(self):
        return len(self.values)

    def __getitem__(self, places):
        return self.values[places].astype(np.int32)

    @property
    def in_memory(self) -> bool:
        """Whether reads need not wait for a disk: what was just written or checked is in the page cache."""
        return self.path is None or self.values.nbytes <= IN_MEMORY

    def fingerprint(self) -> int:
        """Return a checksum of the values."""
        if self.checksum is None:
            self.checksum = zlib.crc32(np.ascontiguousarray(self.values))
        return self.checksum

    def __getstate__(self):  # a worker process maps the file again
        if self.path is None:
            return self.__dict__
        return self.__dict__ | {"values": (self.values.dtype.str, len(self.values))}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.path is not None:
            self.values = _mapped(Path(self.path), *self.values)


@dataclasses.dataclass(frozen=True)
class TokenizedTexts:
    """Texts as tokens.

    Attributes:
      splits: split -> (tokens, end of each document).
      tokenizer: the tokenizer of the tokens.
      header: notes and counts from reading the texts.
    """

    splits: Mapping[str, tuple[Tokens, np.ndarray]]
    tokenizer: Tokenizer
    header: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Number of tokens of all splits."""
        return sum(len(tokens) for tokens, _ in self.splits.values())


def tokenize(texts: Texts, tokenizer: Tokenizer, header: Mapping[str, Any]) -> TokenizedTexts:
    """Tokenize in memory. A document is followed by the tokenizer's `end`, if it has one.

    Args:
      texts: texts by split.
      tokenizer: tokenizer to use.
      header: returned with the tokens.
    """
    splits = {}
    for split, pieces in texts.items():
        parts = [np.zeros(0, _width(tokenizer))]
        ends = _write(pieces(), tokenizer, lambda tokens: parts.append(tokens))  # noqa: B023  called here
        splits[split] = (Tokens(np.concatenate(parts)), ends)
    return TokenizedTexts(splits, tokenizer, dict(header))


def _width(tokenizer: Tokenizer) -> np.dtype:
    """Return the narrowest type that can represent all tokens."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def _write(pieces: Iterable[Piece], tokenizer: Tokenizer, write: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Pass the tokens of some documents to `write` in their narrowest type, a few at a time, and return the end of each document, int64 [documents]."""
    ends, size, end = [0], 0, tokenizer.special("end")
    for few in _together(pieces, getattr(tokenizer, "cuttable", False)):
        for (_, _, whole), tokens in zip(few, _encoded(few, tokenizer), strict=True):
            found = np.append(tokens, np.int32(end)) if whole and end is not None else tokens
            write(found.astype(_width(tokenizer)))
            size += len(found)
            ends += [size] * whole
    if size > ends[-1]:  # the part of a document that another split goes on with
        ends.append(size)
    return np.array(ends[1:], np.int64)


def _together(pieces: Iterable[Piece], cuttable: bool) -> Iterator[list[Piece]]:
    """Yield pieces that are encoded at once. Parts of one document are joined where a tokenizer needs it whole."""
    few, size, waiting = [], 0, []
    for piece in pieces:
        waiting.append(piece)
        if piece.whole or cuttable:
            few.append(_joined(waiting))
            size += len(few[-1].text)
            waiting = []
        if size >= _TOGETHER:
            yield few
            few, size = [], 0
    yield [*few, *([_joined(waiting)] if waiting else [])]


def _joined(parts: list[Piece]) -> Piece:
    return parts[0] if len(parts) == 1 else Piece(parts[0].where, "".join(part.text for part in parts), parts[-1].whole)


def _encoded(pieces: list[Piece], tokenizer: Tokenizer) -> list[np.ndarray]:
    try:
        return encode_all(tokenizer, [piece.text for piece in pieces])
    except ValueError:  # one by one, which finds the document
        result = []
        for where, text, _ in pieces:
            try:
                result.append(tokenizer.encode(text))
            except ValueError as error:
                raise ConfigError(f"config.data.tokenizer: {where}: {error}.") from error
        return result


# The cache


@functools.lru_cache(maxsize=4096)
def _digest(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: str) -> str:
    """Return a checksum of a file's bytes; an unchanged file is read once in a process."""
    stat = os.stat(path)
    return _digest(path, stat.st_size, stat.st_mtime_ns)


def read_cache(key: str) -> tuple[TokenizedTexts | None, str | None]:
    """Return the entry of a key or None, and a message if there is an entry but it is damaged."""
    folder = entry(key)
    try:
        if not folder.exists():
            return None, None
        return _open(folder, folder), None
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{folder} is damaged ({error})"


def write_cache(key: str, texts: Texts, tokenizer: Tokenizer, header: Mapping[str, Any]) -> TokenizedTexts:
    """Tokenize into the cache.

    Raises:
      OSError: the folder cannot be written.
    """
    folder = entry(key)

    def fill(temporary: Path) -> TokenizedTexts:
        _fill(temporary, texts, tokenizer, header)
        return _open(temporary, folder)  # before it is renamed: mapped files stay valid if another process replaces the entry

    return cache.write(folder, fill, lambda: read_cache(key)[0] is not None)


def entry(key: str) -> Path:
    """Return the folder of an entry."""
    return cache_folder() / "tokens" / key


def _fill(folder: Path, texts: Texts, tokenizer: Tokenizer, header: Mapping[str, Any]) -> None:
    """Write all files of an entry."""
    dtype = _width(tokenizer)
    described = {}
    for split, pieces in texts.items():
        with open(_file(folder, split, "tokens"), "wb") as file:
            ends = _write(pieces(), tokenizer, lambda tokens: file.write(tokens.tobytes()))  # noqa: B023  called here
        ends.tofile(_file(folder, split, "ends"))
        checksums = [cache.checksum(_file(folder, split, kind)) for kind in ("tokens", "ends")]
        described[split] = {"tokens": int(ends[-1]) if len(ends) else 0, "documents": len(ends), "crc32": checksums}
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    checksum = cache.checksum(folder / "tokenizer.json")
    values = {"dtype": dtype.str, "tokenizer": checksum, "splits": described, "texts": dict(header)}
    (folder / "header.json").write_text(json.dumps(values), encoding="utf-8")


def _open(folder: Path, final: Path) -> TokenizedTexts:
    """Open an entry in `folder` that is going to be renamed `final`.

    Raises:
      OSError, ValueError, KeyError, TypeError: it is incomplete or damaged.
    """
    header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
    splits = {}
    for split, described in header["splits"].items():
        files = [_file(folder, split, kind) for kind in ("tokens", "ends")]
        if [cache.checksum(file) for file in files] != described["crc32"]:
            raise ValueError(f"the checksum of {split} is not the recorded one")
        values = _mapped(files[0], header["dtype"], described["tokens"])
        ends = np.fromfile(files[1], np.int64)
        if len(ends) != described["documents"]:
            raise ValueError(f"{files[1].name} has {len(ends)} documents, not {described['documents']}")
        splits[split] = (Tokens(values, path=final / files[0].name, checksum=described["crc32"][0]), ends)
    if cache.checksum(folder / "tokenizer.json") != header["tokenizer"]:
        raise ValueError("the checksum of the tokenizer is not the recorded one")
    tokenizer = from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return TokenizedTexts(splits, tokenizer, header["texts"])


def _file(folder: Path, split: str, kind: str) -> Path:
    """Return the path of a split's file; the names of further sets have a slash."""
    return folder / f"{split.replace('/', '-')}.{kind}"


def _mapped(path: Path, dtype: str, size: int) -> np.ndarray:
    if size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(size,))
