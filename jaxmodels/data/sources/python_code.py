"""Text and code that every Python brings along: its standard library, and the help topics of the language reference.

Two sources from the same files, which differ a little between Python versions:

- `python_code`: the code and the topics as text, for (masked) language models;
- `python_packages`: passages of code and which package they come from, for classifiers.

The files of the packages in `PACKAGES` are divided into train, validation and test, a file whole. Neither source ever trains on a
file that validates or tests in either, so that a model pretrained on the one has not seen what the other tests it on.
"""

import dataclasses
import hashlib
import os
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator

from jaxmodels.data.features import Options, Row, open_rows
from jaxmodels.data.source import Dataset
from jaxmodels.data.sources.documents import Document
from jaxmodels.data.sources.text import Packing, TextOptions, corpus_key, open_documents
from jaxmodels.errors import ConfigError

# Those that every Python from 3.11 on has, distributions that leave out parts included, of at least three files.
PACKAGES = (
    "asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "wsgiref", "xml",
)  # fmt: skip
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}  # tests, and what is not the library
_LEFT_OUT |= {"encodings", "pydoc_data"}  # tables; and the topics, which are taken as text
_CYCLE = ("train", "test", "validation", "train")  # where the files of a package go, from the largest on
_SMALLEST = 2000  # characters; smaller files of a package have no part in the passages
_OWN_NAME = re.compile(rf"(?<!\w)(?:{'|'.join(PACKAGES)})(?!\w)", re.IGNORECASE)


def python_code(
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str = "bpe:2048",
    packing: Packing = "contiguous",
    stride: int | None = None,
    characters: int = 4_000_000,
) -> Dataset:
    """The standard library's code and the language reference's topics, as text.

    Trains on the topics and on files drawn by a fixed draw, without the files that validate and test in `python_packages`; the
    former validate here too. Tests, tables of encodings and installed packages are left out. It takes some seconds to tokenise, and
    is kept in the cache of tokens.

    Args:
      data_dir: where a tokenizer's file may lie.
      sequence_length: tokens that a language model reads in one example; `tokens` have one more.
      tokenizer: see `tokenizers.make_tokenizer`; one that has to be made is made from the training text.
      packing, stride: see `text`.
      characters: at most so many are trained on.

    Raises:
      ConfigError: this Python comes without the source of its library.
    """
    options = TextOptions(sequence_length=sequence_length, tokenizer=tokenizer, packing=packing, stride=stride, holdout=0.0)
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

    key = corpus_key(size, digests, options, data_dir)
    dataset = open_documents({split: lambda part=part: part for split, part in documents.items()}, "python_code", options, data_dir, key)
    note = f"{_version()}: {len(training) - 1} files and the help topics train, {len(validation)} files validate"
    return _told(dataset, note, _missing(places))


def python_packages(
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str,
    lines: int = 10,
    examples: int | None = None,
    test_examples: int = 100,
) -> Dataset:
    """Passages of the standard library's code, and which package of `PACKAGES` each comes from.

    A passage is some lines of a file that follow each other, without blank ones. The names of the packages themselves are
    replaced by the word `package`, in all of them, so that an import does not give the answer away.

    Args:
      data_dir: where a tokenizer's file may lie.
      sequence_length: tokens of an example; shorter passages are padded with -1, longer ones cut.
      tokenizer: see `tokenizers.make_tokenizer`; one that has to be made is made from the training passages.
      lines: of a passage.
      examples: training passages of each package, drawn by a fixed draw; all unless given.
      test_examples: at most so many passages of each package validate, and test.

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
    options = Options(
        text_column="text", label_column="package", label="class", labels=tuple(found), source_column=None, target_column=None,
        sequence_length=sequence_length, target_length=None, tokenizer=tokenizer, truncate=True, holdout=0.0, on_bad_example="error",
    )  # fmt: skip
    dataset = open_rows(rows, options, data_dir)
    counts = ", ".join(f"{len(part)} {split}" for split, part in rows.items())
    return _told(dataset, f"{_version()}: passages of {len(found)} packages: {counts}", _missing(places))


def divide(files: dict[str, str]) -> dict[str, str]:
    """path -> split, of the files that passages are taken from.

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
    """The source of the standard library: path below its folder, with `/` -> text."""
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
        yield Row(f"{path}, line {part[0][0]}", (text, _package(path)))


def _package(path: str) -> str:
    return path.partition("/")[0]


def _draw(text: str) -> tuple[int, str]:
    """Sorts in an order that looks random, the same everywhere."""
    return zlib.crc32(text.encode()), text


def _version() -> str:
    return f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"


def _missing(places: dict[str, str]) -> list[str]:
    return [name for name in PACKAGES if not any(_package(path) == name for path in places)]


def _told(dataset: Dataset, note: str, missing: list[str]) -> Dataset:
    """The data set with a note of what it is made from, and a warning of packages that should have been part of it."""
    warnings = (f"data.source: this Python comes without the source of {', '.join(missing)}: left out",) if missing else ()
    return dataclasses.replace(dataset, notes=(note, *dataset.notes), fallbacks=(*dataset.fallbacks, *warnings))
