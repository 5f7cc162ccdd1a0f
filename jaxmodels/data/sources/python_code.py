"""Text and code that every Python ships: its standard library, and the help topics of the language reference.

Two sources from the same files, which differ a little between Python versions:

- `python_code`: the code and the topics as text, for (masked) language models;
- `python_packages`: passages of code labelled by their package, for classifiers.

The files of the packages in `PACKAGES` are divided into train, validation and test; a file is in one split. Neither source trains on a
file that validates or tests in either, so that a model pretrained on one has not seen the test examples of the other.
"""

import dataclasses
import hashlib
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any

from jaxmodels.data.features.base import Row
from jaxmodels.data.features.label import Label
from jaxmodels.data.features.text import Text
from jaxmodels.data.keys import takes
from jaxmodels.data.rows import Holdout, open_rows
from jaxmodels.data.source import Untokenized
from jaxmodels.data.sources.documents import Document
from jaxmodels.data.sources.text import Corpus, DocumentKeys, TextKeys
from jaxmodels.errors import ConfigError

# Packages of at least three files that every Python from 3.11 on has, also in distributions that leave out parts.
PACKAGES = (
    "asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "wsgiref", "xml",
)  # fmt: skip
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}  # tests, and what is not the library
_LEFT_OUT |= {"encodings", "pydoc_data"}  # tables; and the topics, which are read as text
_CYCLE = ("train", "test", "validation", "train")  # where the files of a package go, from the largest on
_SMALLEST = 2000  # characters of the smallest file that passages are taken from
_OWN_NAME = re.compile(rf"(?<!\w)(?:{'|'.join(PACKAGES)})(?!\w)", re.IGNORECASE)


@takes(TextKeys, tokenizer="bpe:2048")
def python_code(data_dir: str | None, *, characters: int = 4_000_000, **keys: Any) -> Untokenized:
    """Read the standard library's code and the language reference's topics, as text.

    Trains on the topics and on files chosen by a fixed draw, without the files that validate and test in `python_packages`; the
    former validate here too. Tests, tables of encodings and installed packages are left out. Tokenizing takes some seconds; the
    tokens are cached.

    Args:
      data_dir: where a tokenizer's file may be.
      characters: maximum number of training characters.

    Raises:
      ConfigError: this Python comes without the source of its library.
    """
    files = _library()
    places = divide(files)
    training, size = [Document("pydoc_data.topics", _topics())], 0
    for path in sorted((path for path in files if places.get(path, "train") == "train"), key=_draw):
        if size + len(files[path]) + len(training[0].text) <= characters:
            training.append(Document(path, files[path]))
            size += len(files[path])
    validation = [Document(path, files[path]) for path in sorted(places) if places[path] == "validation"]
    documents = {"train": training, "validation": validation}

    def digests():
        digest = hashlib.sha256(repr([[(d.where, d.text) for d in part] for part in documents.values()]).encode())
        return ["python_code", digest.hexdigest()]

    readers = {split: lambda part=part: part for split, part in documents.items()}
    corpus = Corpus(readers, "python_code", TextKeys.of(keys), DocumentKeys(holdout=0.0), data_dir, size, digests)
    note = f"{_version()}: {len(training) - 1} files and the help topics train, {len(validation)} files validate"
    return _noted(corpus.open(), note, _missing(places))


@takes(Text, without=("text_column", "truncate"))
def python_packages(data_dir: str | None, *, lines: int = 10, examples: int | None = None, test_examples: int = 100, **keys: Any) -> Untokenized:
    """Read passages of the standard library's code, labelled by their package, one of `PACKAGES`.

    A passage is consecutive lines of a file, without blank ones. The names of the packages are replaced by the word `package`
    in all passages, so that an import does not reveal the label.

    Args:
      data_dir: where a tokenizer's file may be.
      lines: lines of a passage.
      examples: training passages of each package, chosen by a fixed draw; all by default.
      test_examples: maximum number of passages of each package that validate, and that test.

    Raises:
      ConfigError: this Python comes without the source of its library.
    """
    if lines < 1 or test_examples < 1 or (examples is not None and examples < 1):
        raise ConfigError(f"config.data: lines, examples and test_examples must be at least 1, got {lines}, {examples}, {test_examples}.")
    files = _library()
    places = divide(files)
    found = [name for name in PACKAGES if any(_package(path) == name for path in places)]
    rows = {"train": [], "validation": [], "test": []}
    for name in found:
        for split in rows:
            passages = [p for path in sorted(places) if _package(path) == name and places[path] == split for p in _passages(path, files[path], lines)]
            passages.sort(key=lambda row: _draw(row.where))
            rows[split] += passages[: examples if split == "train" else test_examples]
    features = [Text.of(keys | {"text_column": "text"}), Label(label_column="label", labels=tuple(found))]
    counts = ", ".join(f"{len(part)} {split}" for split, part in rows.items())
    opened = open_rows(lambda: rows, features, Holdout(holdout=0.0), data_dir)
    return _noted(opened, f"{_version()}: passages of {len(found)} packages: {counts}", _missing(places))


def divide(files: dict[str, str]) -> dict[str, str]:
    """Return path -> split, of the files that passages are taken from.

    The files of each package go in turn to train, test, validation and train, from the largest on; a package with fewer than
    three is left out.
    """
    places = {}
    for name in PACKAGES:
        own = [path for path, content in files.items() if _package(path) == name and len(content) >= _SMALLEST]
        if len(own) >= 3:
            own.sort(key=lambda path: (-len(files[path]), path))
            places |= {path: _CYCLE[i % len(_CYCLE)] for i, path in enumerate(own)}
    return places


def _library() -> dict[str, str]:
    """Return the source of the standard library: path below its folder, with `/` -> text."""
    root = sysconfig.get_path("stdlib")
    files = {}
    for folder, folders, names in os.walk(root):
        # Build settings and start-up hooks differ from machine to machine.
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize")):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8", errors="replace") as file:
                    files[os.path.relpath(path, root).replace(os.sep, "/")] = file.read()
    files = {path: text for path, text in files.items() if text.strip()}
    if not any(_package(path) in PACKAGES for path in files):
        raise ConfigError(f"config.data.source: this Python comes without the source of its library: {root} has no .py files of its packages.")
    return files


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[title] for title in sorted(topics))


def _passages(path: str, content: str, lines: int) -> Iterator[Row]:
    kept = [(number, line.rstrip()) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    for start in range(0, len(kept) - lines + 1, lines):
        part = kept[start : start + lines]
        text = _OWN_NAME.sub("package", "\n".join(line for _, line in part))
        yield Row(f"{path}, line {part[0][0]}", {"text": text, "label": _package(path)})


def _package(path: str) -> str:
    return path.partition("/")[0]


def _draw(text: str) -> tuple[int, str]:
    """Return a sort key of an order that looks random and is the same on every machine."""
    return zlib.crc32(text.encode()), text


def _version() -> str:
    return f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"


def _missing(places: dict[str, str]) -> list[str]:
    return [name for name in PACKAGES if not any(_package(path) == name for path in places)]


def _noted(opened: Untokenized, note: str, missing: list[str]) -> Untokenized:
    """Return the data set with a note of its contents, and a warning that names missing packages."""
    warnings = (f"data.source: this Python comes without the source of {', '.join(missing)}: left out",) if missing else ()

    def tokenize(tokenizer):
        dataset = opened.tokenize(tokenizer)
        return dataclasses.replace(dataset, notes=(note, *dataset.notes), fallbacks=(*dataset.fallbacks, *warnings))

    return dataclasses.replace(opened, tokenize=tokenize)
