"""Text as examples of tokens, for language models."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np

from jaxmodels.data import tokens as tokens_lib
from jaxmodels.data.files import find_files
from jaxmodels.data.packing import Packed, Windows
from jaxmodels.data.skipping import Policy, Skipping
from jaxmodels.data.source import Dataset
from jaxmodels.data.sources.documents import Document, read_documents, survey
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer
from jaxmodels.tokenizers.factory import LIBRARY_VERSION, Shared, is_made_from_text, make_tokenizer
from jaxmodels.tokenizers.simple import ByteTokenizer, CharacterTokenizer

Packing = Literal["contiguous", "examples"]

# Bytes of text from which on it is tokenised into the cache: some seconds' work. Characters and bytes take almost no time.
CACHE_FROM = 1 << 20
CACHE_QUICK_FROM = 64 << 20
QUICK = ("character", "byte", "character+special", "byte+special")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What the sources of text have in common; described at `text`."""

    sequence_length: int
    tokenizer: str | Tokenizer
    packing: Packing
    stride: int | None
    holdout: float
    on_bad_example: Policy = "error"

    def __post_init__(self):
        if self.sequence_length < 1 or (self.stride is not None and self.stride < 1):
            raise ConfigError(f"config.data: sequence_length and stride must be at least 1, got {self.sequence_length} and {self.stride}.")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"config.data.holdout must be at least 0 and below 1, got {self.holdout}.")
        if self.packing == "examples" and self.stride is not None:
            raise ConfigError("config.data.stride is between windows of data.packing='contiguous'; with 'examples' there are none.")


def text(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str = "character",
    packing: Packing = "contiguous",
    stride: int | None = None,
    holdout: float = 0.1,
    validation: str | None = None,
    test: str | None = None,
    text_column: str = "text",
    on_bad_example: Policy = "error",
) -> Dataset:
    """Text files, UTF-8: each is a document, or of JSON lines (`.jsonl`, `.ndjson`) each line.

    Args:
      path: files, as `files.find_files` reads it: `docs/**/*.txt,more.jsonl`. Absolute, or relative to the working
        directory or else to the data directory.
      data_dir: the data directory.
      sequence_length: tokens that a model reads in one example.
      tokenizer: see `tokenizers.make_tokenizer`; one that has to be made is made from the training text (the alphabet of
        `character` from all the text).
      packing: `contiguous`, windows of the whole text, or `examples`, rows of whole documents with `segments`. Where the tokenizer
        has an `end`, each document is followed by it.
      stride: tokens between the starts of two training windows; `sequence_length` unless given. With 1, an epoch
        has a window starting at every token.
      holdout: share of the text, at its end, that validates where `validation` names no files; 0 for none.
      validation, test: files of that split, given like `path`.
      text_column: the key of the text in JSON lines.
      on_bad_example: `error`, or `skip`: a document without text, or that cannot be read, is left out, counted, and told of.

    Raises:
      ConfigError: a file is missing; a document is bad, by file and line; a split is shorter than one example.
    """
    options = TextOptions(sequence_length=sequence_length, tokenizer=tokenizer, packing=packing, stride=stride, holdout=holdout, on_bad_example=on_bad_example)
    files = {"train": find_files(path, data_dir)}
    for split, paths in (("validation", validation), ("test", test)):
        if paths is not None:
            files[split] = find_files(paths, data_dir, f"config.data.{split}")
    documents = {split: functools.partial(read_documents, paths, text_column) for split, paths in files.items()}
    return open_documents(documents, path, options, data_dir, _key(files, text_column, options, data_dir))


def python_docs(
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: str = "character",
    packing: Packing = "contiguous",
    stride: int | None = None,
    holdout: float = 0.1,
) -> Dataset:
    """English that every Python ships: the help topics of the language reference, `pydoc_data.topics`, by title.

    Its length differs a little between Python versions (3.11: 464,970 characters). Arguments as those of `text`; with `packing`
    `examples`, each topic is a document.
    """
    from pydoc_data.topics import topics

    options = TextOptions(sequence_length=sequence_length, tokenizer=tokenizer, packing=packing, stride=stride, holdout=holdout)
    documents = [Document(title, topics[title]) for title in sorted(topics)]
    if packing == "contiguous":
        documents = [Document("pydoc_data.topics", "\n\n".join(document.text for document in documents))]
    return open_documents({"train": lambda: documents}, "pydoc_data.topics", options, data_dir, None)


def _key(files: Mapping[str, list[str]], text_column: str, options: TextOptions, data_dir: str | None) -> str | None:
    size = sum(os.path.getsize(path) for paths in files.values() for path in paths)

    def digests():
        return [{split: [(tokens_lib.file_digest(path), os.path.splitext(path)[1]) for path in paths] for split, paths in files.items()}, text_column]

    return corpus_key(size, digests, options, data_dir)


def corpus_key(size: int, digests: Callable[[], list], options: TextOptions, data_dir: str | None) -> str | None:
    """The key of texts in the cache; None for those that are tokenised anew each time.

    Args:
      size: bytes or so of all texts.
      digests: what the texts are known by, of anything that JSON can hold; called if the cache is used.
      options: how they are tokenised.
      data_dir: the data directory.
    """
    tokenizer = options.tokenizer
    if isinstance(tokenizer, Shared):
        return None  # it is not made yet
    quick = isinstance(tokenizer, (CharacterTokenizer, ByteTokenizer)) or tokenizer in QUICK
    if size < (CACHE_QUICK_FROM if quick else CACHE_FROM):
        return None
    made_by = [tokenizer, LIBRARY_VERSION] if is_made_from_text(tokenizer) else make_tokenizer(tokenizer, (), data_dir).to_json()
    return tokens_lib.cache_key(made_by, *digests(), options.holdout, options.on_bad_example)


def open_documents(
    documents: Mapping[str, Callable[[], Iterable[Document]]], where: str, options: TextOptions, data_dir: str | None, key: str | None
) -> Dataset:
    """Tokenises, or finds tokenised, and lays out examples; `where` names the text in errors."""
    notes, fallbacks, done = [], [], None
    if key is not None:
        done, problem = tokens_lib.read_cache(key)
        notes += [f"warning: {problem}; it is made anew"] if problem else []
        notes += [f"{done.size:,} tokens read from {tokens_lib.entry(key)}"] if done else []
    if done is None:
        skipping = Skipping(options.on_bad_example)
        corpora = survey(documents, options.holdout, skipping)
        # An alphabet must hold every character there is; all else is made from the text that trains.
        fed = corpora.values() if options.tokenizer == "character" else [corpora["train"]]
        tokenizer = make_tokenizer(options.tokenizer, itertools.chain.from_iterable(fed), data_dir)
        texts = {split: corpus.pieces for split, corpus in corpora.items()}
        header = {"skipped": skipping.counts, "notes": skipping.notes()}
        if key is not None:
            try:
                done = tokens_lib.write_cache(key, texts, tokenizer, header)
                notes.append(f"{done.size:,} tokens written to {tokens_lib.entry(key)}: the next start reads them")
            except OSError as error:
                cure = "set JAXMODELS_CACHE_DIR to a folder that can be written"
                fallbacks.append(f"no cache of tokens ({error}): every start tokenises anew; {cure}")
        done = done or tokens_lib.tokenise(texts, tokenizer, header)
    splits = {split: _lay_out(split, *part, options) for split, part in done.splits.items()}
    for split, (tokens, _) in done.splits.items():
        if not len(splits[split]):
            least = "one window" if split == "train" and options.packing == "contiguous" else "one target"
            length = options.sequence_length
            raise ConfigError(f"config.data: {where} has {len(tokens)} tokens in {split}: less than {least} of sequence_length={length}.")
        if options.packing == "examples":
            notes.append(f"{split}: {len(splits[split]):,} rows, {splits[split].fill:.1%} of their places filled")
    info = {"vocab_size": done.tokenizer.vocab_size, "tokenizer": done.tokenizer}
    return Dataset(splits, info, notes=(*done.header["notes"], *notes), fallbacks=tuple(fallbacks), skipped=dict(done.header["skipped"]))


def _lay_out(split: str, tokens: tokens_lib.Tokens, ends: np.ndarray, options: TextOptions) -> Windows | Packed:
    """The examples of a split."""
    length = options.sequence_length
    if options.packing == "examples":
        return Packed(tokens, ends, length)
    return Windows(tokens, length, options.stride or length, cover=split != "train")
