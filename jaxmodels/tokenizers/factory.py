"""Tokenizers: text to whole numbers and back. The one a run used is saved in the run's folder, as `tokenizer.json`.

A config names one by a specification, which `make_tokenizer` reads. Four special tokens have names of their own here,
whatever a tokenizer's file calls them: `unknown`, `start`, `end`, `mask`; those made here have them as ids 0 to 3.
"""

import base64
import json
import os
import re
from collections.abc import Iterable

import tokenizers as library

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import SPECIAL, Tokenizer
from jaxmodels.tokenizers.bpe import TokenizersTokenizer
from jaxmodels.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxmodels.tokenizers.simple import ByteTokenizer, CharacterTokenizer, WordTokenizer

LIBRARY_VERSION = library.__version__  # another one may train to another end
FORMS = ("character", "byte", "character+special", "byte+special", "word:MAX", "word-lower:MAX", "bpe:SIZE")
FORMS += ("FILE.json", "FILE.model", "RUN", "hf:DIR_OR_ID")

SMALLEST_BPE = len(SPECIAL) + 256


class Shared(str):
    """The specification of a tokenizer that several sources are going to share: none of them makes it, all hand over their texts."""


class HandedOver(Exception):
    """Raised instead of making a tokenizer by a `Shared` specification.

    Attributes:
      texts: what it would have been made from.
    """

    def __init__(self, texts: Iterable[str]):
        super().__init__("texts")
        self.texts = texts


def make_tokenizer(spec: str | Tokenizer, texts: Iterable[str], data_dir: str | None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      spec: `character` (the alphabet of `texts`) or `byte`, both also with `+special`, which puts the special tokens first;
        `word:MAX` and `word-lower:MAX` (the most frequent words of `texts`); `bpe:SIZE` (byte-level BPE trained on `texts`);
        the path of a file of the `tokenizers` library, of a SentencePiece `.model`, or of a run's folder; or `hf:DIR_OR_ID`, that
        of a published model (`published_tokenizer`). A tokenizer is given back.
      texts: what it is trained on; read only if it is trained. One that is encoded without `unknown` (`character`) must
        be given all the text there is.
      data_dir: where relative paths are looked for, after the working directory.

    Raises:
      ConfigError: no such form or file, a file that is no tokenizer, a size out of range, or no text to train on.
      HandedOver: a `Shared` specification.
    """
    if isinstance(spec, Shared):
        raise HandedOver(texts)
    if not isinstance(spec, str):
        return spec
    if spec in ("byte", "byte+special"):
        return ByteTokenizer(special=spec.endswith("special"))
    if spec in ("character", "character+special"):
        alphabet = set().union(*texts)
        if not alphabet:
            raise ConfigError(f"config.data.tokenizer={spec!r}: the training text is empty.")
        return CharacterTokenizer("".join(alphabet), special=spec.endswith("special"))
    if is_made_from_text(spec):
        return _train(spec, texts)
    if spec.startswith("hf:"):
        from jaxmodels.tokenizers import pretrained as published_tokenizer

        return published_tokenizer.from_reference(spec, data_dir)
    return _from_path(spec, data_dir)


def is_made_from_text(spec: str | Tokenizer) -> bool:
    """Whether a tokenizer depends on the texts it is made from."""
    return isinstance(spec, str) and re.fullmatch(r"character(\+special)?|(word|word-lower|bpe):.*", spec) is not None


def _train(spec: str, texts: Iterable[str]) -> Tokenizer:
    form, _, number = spec.partition(":")
    smallest = SMALLEST_BPE if form == "bpe" else 1
    if not (number.isascii() and number.isdigit()) or not smallest <= int(number) < 2**31:
        shown = "SIZE" if form == "bpe" else "MAX"
        raise ConfigError(f"config.data.tokenizer: {form}:{shown} takes a whole number from {smallest} on, got {spec!r}.")
    if form == "bpe":
        return TokenizersTokenizer.train(texts, int(number))
    tokenizer = WordTokenizer.train(texts, int(number), lower=form == "word-lower")
    if not tokenizer.words:
        raise ConfigError(f"config.data.tokenizer={spec!r}: there is no word in the training text.")
    return tokenizer


def _from_path(spec: str, data_dir: str | None) -> Tokenizer:
    """The tokenizer of a file or a run's folder."""
    places = [spec] + ([os.path.join(data_dir, spec)] if data_dir else [])
    path = next((place for place in places if os.path.exists(place)), None)
    if path is None:
        hint = config_lib.suggest(spec, FORMS)
        raise ConfigError(f"config.data.tokenizer: {spec!r} is none of {', '.join(FORMS)}; and there is no file {' nor '.join(places)}.{hint}")
    if os.path.isdir(path):
        path = os.path.join(path, "tokenizer.json")
        if not os.path.isfile(path):
            raise ConfigError(f"config.data.tokenizer: the folder {os.path.dirname(path)} holds no tokenizer.json: not a run on text.")
    try:
        with open(path, "rb") as file:
            content = file.read()
        return SentencePieceTokenizer(content) if path.endswith(".model") else from_json(content.decode("utf-8"))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  the libraries raise bare Exception
        wanted = "a SentencePiece model" if path.endswith(".model") else "a tokenizer in JSON, as the `tokenizers` library or a run writes it"
        raise ConfigError(f"config.data.tokenizer: {path} is not {wanted}: {error}") from error


def from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` gave `text`; or a file of the `tokenizers` library.

    Raises:
      ValueError: it is neither.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"a tokenizer is a JSON object, not {type(values).__name__}")
    kind = values.get("kind")
    if kind == "character":
        return CharacterTokenizer(values["alphabet"], special=values.get("special", False))
    if kind == "byte":
        return ByteTokenizer(special=values.get("special", False))
    if kind == "word":
        return WordTokenizer(values["words"], lower=values["lower"])
    if kind == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(values["model"]))
    if kind == "published":
        from jaxmodels.tokenizers.pretrained import PublishedTokenizer

        return PublishedTokenizer.from_values(values)
    if "model" in values:
        return TokenizersTokenizer(text)
    known = "character, byte, word, sentencepiece, published, and files of the `tokenizers` library"
    raise ValueError(f"unknown kind of tokenizer {kind!r}; there are {known}")
