"""Texts as token ids, for language models."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmodels.data import cache, copies, fitted
from jaxmodels.data import tokens as tokens_lib
from jaxmodels.data.evaluation_sets import EvaluationSets, is_named, key_of
from jaxmodels.data.files import find_files
from jaxmodels.data.keys import Keys, takes
from jaxmodels.data.packing import Packed, Windows
from jaxmodels.data.skipping import Policy, Skipping
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.data.sources.documents import Document, read_documents, survey
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import Tokenizer
from jaxmodels.tokenizers.factory import LIBRARY_VERSION, is_trained, make_tokenizer
from jaxmodels.tokenizers.simple import ByteTokenizer, CharacterTokenizer

Packing = Literal["contiguous", "examples"]

# Least bytes of text that are tokenized into the cache: some seconds of work. Characters and bytes take almost no time.
CACHE_FROM = 1 << 20
CACHE_QUICK_FROM = 64 << 20
QUICK = ("character", "byte", "character+special", "byte+special")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextKeys(Keys):
    """Keys of all sources of text.

    Attributes:
      sequence_length: tokens that a model reads in one example; `tokens` have one more.
      tokenizer: specification of a tokenizer (see `tokenizers.factory.make_tokenizer`), trained on the training text where it is trained;
        the alphabet of `character` comes from the main splits.
      packing: `contiguous`, windows of the whole text, or `examples`, rows of whole documents with `segments`. If the tokenizer
        has an `end`, each document is followed by it.
      stride: tokens between the starts of two training windows; `sequence_length` by default. With 1, a window starts at every token.
    """

    sequence_length: int
    tokenizer: str = "character"
    packing: Packing = "contiguous"
    stride: int | None = None

    def __post_init__(self):
        if self.sequence_length < 1 or (self.stride is not None and self.stride < 1):
            raise ConfigError(f"config.data: sequence_length and stride must be at least 1, got {self.sequence_length} and {self.stride}.")
        if self.packing == "examples" and self.stride is not None:
            raise ConfigError("config.data.stride is between windows of data.packing='contiguous'; with 'examples' there are none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentKeys(Keys):
    """Keys of sources whose documents are divided into splits.

    Attributes:
      holdout: fraction of the text, at its end, that validates where no validation files are named; 0 for none.
      on_bad_example: `error`, or `skip`: leave out documents without text or that cannot be read, and count them.
    """

    holdout: float = 0.1
    on_bad_example: Policy = "error"

    def __post_init__(self):
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"config.data.holdout must be at least 0 and below 1, got {self.holdout}.")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents and how they become examples.

    Attributes:
      documents: split -> function that reads them.
      where: name of the text, for errors.
      text: keys of text.
      options: keys of documents.
      data_dir: the data directory.
      size: approximate bytes of all documents, which decides whether their tokens are cached.
      digests: returns what identifies the documents in the cache, as JSON values; None if their tokens are never cached.
    """

    documents: Mapping[str, Callable[[], Iterable[Document]]]
    where: str
    text: TextKeys
    options: DocumentKeys
    data_dir: str | None
    size: int = 0
    digests: Callable[[], list] | None = None

    def open(self) -> Untokenized:
        """Return the data set that is still to be tokenized."""
        return Untokenized(self.text.tokenizer, self.training_texts, self.tokenize)

    def training_texts(self) -> Iterator[str]:
        """Return the texts that the tokenizer is trained on."""
        return _texts(survey(self.documents, self.options.holdout, Skipping(self.options.on_bad_example)), self.text.tokenizer)

    def tokenize(self, tokenizer: str | Tokenizer) -> Dataset:
        """Tokenize the documents, or read their tokens from the cache, and lay out the examples."""
        key = self._key(tokenizer)
        notes, fallbacks, done = [], [], None
        if key is not None:
            key = self._key_of_training(tokenizer) or key
            done, problem = tokens_lib.read_cache(key)
            notes += [f"warning: {problem}; it is written again"] if problem else []
            notes += [f"{done.size:,} tokens read from {tokens_lib.entry(key)}"] if done else []
        if done is None:
            skipping = Skipping(self.options.on_bad_example)
            corpora = survey(self.documents, self.options.holdout, skipping)
            coder = make_tokenizer(tokenizer, _texts(corpora, tokenizer), self.data_dir)
            texts = {split: part.pieces for split, part in corpora.items()}
            header = {"skipped": skipping.counts, "notes": skipping.notes()}
            if key is not None:
                try:
                    done = tokens_lib.write_cache(key, texts, coder, header)
                    notes.append(f"{done.size:,} tokens written to {tokens_lib.entry(key)}: the next start reads them")
                except OSError as error:
                    fix = "set JAXMODELS_CACHE_DIR to a folder that can be written"
                    fallbacks.append(f"no cache of tokens ({error}): every start tokenizes again; {fix}")
            done = done or tokens_lib.tokenize(texts, coder, header)
        splits = {split: self._examples(split, *part) for split, part in done.splits.items()}
        if self.text.packing == "examples":
            notes += [f"{split}: {len(part):,} rows, {part.fill:.1%} of their positions filled" for split, part in splits.items()]
        info = {"vocab_size": done.tokenizer.vocab_size, "tokenizer": done.tokenizer}
        return Dataset(splits, info, notes=(*done.header["notes"], *notes), fallbacks=tuple(fallbacks), skipped=dict(done.header["skipped"]))

    def _key_of_training(self, tokenizer: str | Tokenizer) -> str | None:
        """Return the key by which the training of a run has cached these tokens, that of its tokenizer's specification; None if there are none."""
        spec = fitted.get("specification")
        key = self._key(spec) if spec is not None and is_trained(spec) else None
        done = None if key is None else tokens_lib.read_cache(key)[0]
        return key if done is not None and done.tokenizer.to_json() == tokenizer.to_json() else None

    def _key(self, tokenizer: str | Tokenizer) -> str | None:
        """Return the key of the tokens in the cache, or None if they are not cached."""
        quick = isinstance(tokenizer, (CharacterTokenizer, ByteTokenizer)) or tokenizer in QUICK
        if self.digests is None or self.size < (CACHE_QUICK_FROM if quick else CACHE_FROM):
            return None
        made_by = [tokenizer, LIBRARY_VERSION] if is_trained(tokenizer) else make_tokenizer(tokenizer, (), self.data_dir).to_json()
        return cache.cache_key(tokens_lib.VERSION, made_by, *self.digests(), self.options.holdout, self.options.on_bad_example)

    def _examples(self, split: str, tokens: tokens_lib.Tokens, ends: np.ndarray) -> Windows | Packed:
        """Return the examples of a split; ConfigError if there are none."""
        length, packed = self.text.sequence_length, self.text.packing == "examples"
        trains = split == "train" and not fitted.is_given()
        examples = Packed(tokens, ends, length) if packed else Windows(tokens, length, self.text.stride or length, cover=not trains)
        if not len(examples):
            least = "one window" if trains and not packed else "one target"
            raise ConfigError(f"config.data: {self.where} has {len(tokens)} tokens in {split}: less than {least} of sequence_length={length}.")
        return examples


def _texts(corpora: Mapping[str, Iterable[str]], spec: str | Tokenizer) -> Iterator[str]:
    """Yield what a tokenizer is trained on: `character`, which has no token for unknown characters, needs the texts of the main splits."""
    return itertools.chain.from_iterable(corpora.values() if spec == "character" else [corpora[split] for split in corpora if split == "train"])


@takes(TextKeys, DocumentKeys, EvaluationSets)
def text(path: str, data_dir: str | None, *, validation: str | None = None, test: str | None = None, text_column: str = "text", **keys: Any) -> Untokenized:
    """Read UTF-8 text files, each of which is a document; in JSON lines (`.jsonl`, `.ndjson`), each line is one.

    Args:
      path: files, as `files.find_files` reads them: `docs/**/*.txt,more.jsonl`. Absolute, or relative to the working
        directory or else to the data directory.
      data_dir: the data directory.
      validation, test: files of that split, given like `path`.
      text_column: key of the text in JSON lines.

    Raises:
      ConfigError: a file is missing; a document is bad, by file and line; a split is shorter than one example.
    """
    files = {"train": find_files(path, data_dir)}
    for split, paths in {"validation": validation, "test": test, **EvaluationSets.of(keys).named()}.items():
        if paths is not None:
            files[split] = find_files(paths, data_dir, key_of(split))
    on_disk = {split: copies.keep(paths) for split, paths in files.items()}

    def corpus(*splits: str) -> Corpus:
        documents = {split: functools.partial(read_documents, files[split], text_column) for split in splits}
        size = sum(os.path.getsize(path) for split in splits for path in on_disk[split])
        return Corpus(documents, path, TextKeys.of(keys), DocumentKeys.of(keys), data_dir, size, functools.partial(digests, splits))

    def digests(splits):
        return [{split: [(tokens_lib.file_digest(path), os.path.splitext(path)[1]) for path in on_disk[split]] for split in splits}, text_column]

    main, further = corpus(*(split for split in files if not is_named(split))), [corpus(split) for split in files if is_named(split)]
    return dataclasses.replace(main.open(), tokenize=functools.partial(_tokenize, main, further))


def _tokenize(main: Corpus, further: Sequence[Corpus], tokenizer: str | Tokenizer) -> Dataset:
    """Tokenize the main splits, and each further set with their tokenizer. A set has tokens of its own in the cache, so adding one costs its own only."""
    dataset = main.tokenize(tokenizer)
    sets = [corpus.tokenize(dataset.info["tokenizer"]) for corpus in further]
    splits = dict(item for part in (dataset, *sets) for item in part.splits.items())
    skipped = dict(item for part in (dataset, *sets) for item in part.skipped.items())
    notes, fallbacks = ([text for part in (dataset, *sets) for text in texts(part)] for texts in (lambda part: part.notes, lambda part: part.fallbacks))
    return dataclasses.replace(dataset, splits=splits, skipped=skipped, notes=tuple(notes), fallbacks=tuple(fallbacks))


@takes(TextKeys, DocumentKeys, without=("on_bad_example",))
def python_docs(data_dir: str | None, **keys: Any) -> Untokenized:
    """Read English that every Python ships: the help topics of the language reference, `pydoc_data.topics`, by title.

    Its length differs a little between Python versions (3.11: 464,970 characters). With `packing='examples'`, each topic is a document.

    Args:
      data_dir: the data directory.
    """
    from pydoc_data.topics import topics

    documents = [Document(title, topics[title]) for title in sorted(topics)]
    if keys["packing"] == "contiguous":
        documents = [Document("pydoc_data.topics", "\n\n".join(document.text for document in documents))]
    return Corpus({"train": lambda: documents}, "pydoc_data.topics", TextKeys.of(keys), DocumentKeys.of(keys), data_dir).open()
