"""Tokenizers by specification. A run saves its tokenizer in its folder, as `tokenizer.json`.

Four special tokens have fixed names here, whatever a tokenizer's file calls them: `unknown`, `start`, `end`, `mask`;
tokenizers that are trained here have them as ids 0 to 3.
"""

import base64
import json
import re
from collections.abc import Iterable

import tokenizers as library

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError
from jaxmodels.storage import paths as storage
from jaxmodels.tokenizers.base import SPECIAL, Added, Tokenizer
from jaxmodels.tokenizers.bpe import TokenizersTokenizer
from jaxmodels.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxmodels.tokenizers.simple import ByteTokenizer, CharacterTokenizer, WordTokenizer

LIBRARY_VERSION = library.__version__  # another version may train another tokenizer from the same texts
FORMS = ("character", "byte", "character+special", "byte+special", "word:MAX", "word-lower:MAX", "bpe:SIZE")
FORMS += ("FILE.json", "FILE.model", "RUN", "hf:DIR_OR_ID")

SMALLEST_BPE = len(SPECIAL) + 256


def make_tokenizer(spec: str | Tokenizer, texts: Iterable[str], data_dir: str | None) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` specifies.

    Args:
      spec: `character` (the alphabet of `texts`) or `byte`, both also with `+special`, which puts the special tokens first;
        `word:MAX` and `word-lower:MAX` (the most frequent words of `texts`); `bpe:SIZE` (byte-level BPE trained on `texts`);
        the path of a file of the `tokenizers` library, of a SentencePiece `.model`, or of a run's folder; or `hf:DIR_OR_ID`, that
        of a pretrained model. A tokenizer is returned as it is. `?add=TOKEN,TOKEN` at the end adds tokens to one of the `tokenizers` library
        (`bpe:SIZE`, a run, a file, `hf:`): a text is never split within one. Those of `?add_special=TOKEN` are recognised in the text of chat
        templates only, as other special tokens.
      texts: training texts; read only if the tokenizer is trained. `character`, which has no `unknown`, needs the texts of
        the main splits, too.
      data_dir: directory where relative paths are looked for, after the working directory.

    Raises:
      ConfigError: no such form or file, a file that is no tokenizer, a size out of range, or no text to train on.
    """
    if not isinstance(spec, str):
        return spec
    spec, added = split_added(spec)
    if added:
        tokenizer = make_tokenizer(spec, texts, data_dir)
        if not hasattr(tokenizer, "with_added"):
            raise ConfigError(f"config.data.tokenizer={spec!r} takes no added tokens; bpe:SIZE, hf:DIR_OR_ID and files of the `tokenizers` library do.")
        return tokenizer.with_added(added)
    if spec in ("byte", "byte+special"):
        return ByteTokenizer(special=spec.endswith("special"))
    if spec in ("character", "character+special"):
        alphabet = set().union(*texts)
        if not alphabet:
            raise ConfigError(f"config.data.tokenizer={spec!r}: the training text is empty.")
        return CharacterTokenizer("".join(alphabet), special=spec.endswith("special"))
    if is_trained(spec):
        return _train(spec, texts)
    if spec.startswith("hf:"):
        from jaxmodels.tokenizers.pretrained import from_reference

        return from_reference(spec, data_dir)
    return _from_path(spec, data_dir)


def split_added(spec: str) -> tuple[str, tuple[Added, ...]]:
    """Return a specification without the tokens that it adds (`SPEC?add=TOKEN,TOKEN?add_special=TOKEN`), and these, in order.

    Raises:
      ConfigError: a token is empty, or is added twice.
    """
    spec, *parts = re.split(r"\?(?=add=|add_special=)", spec)
    keys = [part.partition("=") for part in parts]
    tokens = [(text, key == "add_special") for key, _, texts in keys for text in texts.split(",")]
    texts = [text for text, _ in tokens]
    if "" in (text.strip() for text in texts):
        raise ConfigError(f"config.data.tokenizer: an added token is empty, in ?{parts[0][:80]}: give SPEC?add=TOKEN,TOKEN.")
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ConfigError(f"config.data.tokenizer adds {twice[0]!r} twice.")
    return spec, tuple(tokens)


def is_trained(spec: str | Tokenizer) -> bool:
    """Whether a specification trains a tokenizer on texts."""
    return isinstance(spec, str) and re.fullmatch(r"character(\+special)?|(word|word-lower|bpe):.*", split_added(spec)[0]) is not None


def is_path(spec: str) -> bool:
    """Whether a specification names a file or a run's folder."""
    spec = split_added(spec)[0]
    return not (is_trained(spec) or spec in FORMS or spec.startswith("hf:"))


def _train(spec: str, texts: Iterable[str]) -> Tokenizer:
    form, _, number = spec.partition(":")
    smallest = SMALLEST_BPE if form == "bpe" else 1
    if not (number.isascii() and number.isdigit()) or not smallest <= int(number) < 2**31:
        shown = "SIZE" if form == "bpe" else "MAX"
        raise ConfigError(f"config.data.tokenizer: {form}:{shown} needs a whole number of at least {smallest}, got {spec!r}.")
    if form == "bpe":
        return TokenizersTokenizer.train(texts, int(number))
    tokenizer = WordTokenizer.train(texts, int(number), lower=form == "word-lower")
    if not tokenizer.words:
        raise ConfigError(f"config.data.tokenizer={spec!r}: there is no word in the training text.")
    return tokenizer


def _from_path(spec: str, data_dir: str | None) -> Tokenizer:
    """Return the tokenizer of a file or of a run's folder."""
    places = [storage.parse(spec, "config.data.tokenizer")]
    if not places[0].exists() and data_dir:
        places.append(storage.parse(storage.join(data_dir, spec), "config.data.tokenizer"))
    path = next((place for place in places if place.exists()), None)
    if path is None:
        hint = config_lib.suggest(spec, FORMS)
        raise ConfigError(f"config.data.tokenizer: {spec!r} is none of {', '.join(FORMS)}; and there is no file {' nor '.join(map(str, places))}.{hint}")
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"config.data.tokenizer: the folder {path.parent} has no tokenizer.json: it is not a run on text.")
    try:
        content = path.read_bytes()
        return SentencePieceTokenizer(content) if path.suffix == ".model" else from_json(content.decode("utf-8"))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001  the libraries raise bare Exception
        wanted = "a SentencePiece model" if path.suffix == ".model" else "a tokenizer in JSON, as the `tokenizers` library or a run writes it"
        raise ConfigError(f"config.data.tokenizer: {path} is not {wanted}: {error}") from error


def from_json(text: str) -> Tokenizer:
    """Return the tokenizer whose `to_json` returned `text`, or that of a file of the `tokenizers` library.

    Raises:
      ValueError: `text` is neither.
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
        from jaxmodels.tokenizers.pretrained import PretrainedTokenizer

        return PretrainedTokenizer.from_values(values)
    if "model" in values:
        return TokenizersTokenizer(text)
    known = "character, byte, word, sentencepiece, published, and files of the `tokenizers` library"
    raise ValueError(f"unknown kind of tokenizer {kind!r}; there are {known}")


def extends(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether a tokenizer is that of the JSON `text`, or that one with added tokens."""
    if tokenizer.to_json() == text:
        return True
    other = from_json(text)
    if isinstance(other, TokenizersTokenizer) and isinstance(tokenizer, TokenizersTokenizer):
        added = tokenizer.added_from(other.vocab_size)
    elif hasattr(tokenizer, "added"):
        added = tokenizer.added[len(getattr(other, "added", ())) :]
    else:
        return False
    try:
        return bool(added) and other.with_added(added).to_json() == tokenizer.to_json()
    except (ConfigError, AttributeError):
        return False
