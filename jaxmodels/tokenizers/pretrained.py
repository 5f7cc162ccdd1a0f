"""Tokenizers of pretrained models, from the files beside the weights, in the format of the `transformers` library.

`tokenizer.json` is a file of the `tokenizers` library; older models have a SentencePiece model, `vocab.txt` (WordPiece), or `vocab.json` and
`merges.txt` (byte-level BPE) instead. `tokenizer_config.json` and `special_tokens_map.json` name the special tokens; `tokenizer_config.json`
or `chat_template.jinja` has the chat template.
"""

import base64
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.folder import Folder, find, split_accepted
from jaxmodels.pretrained.limits import check_values
from jaxmodels.storage import paths as storage
from jaxmodels.tokenizers.base import Added, cut_longest
from jaxmodels.tokenizers.bpe import MOST_TOKENS
from jaxmodels.tokenizers.files import make_coder

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
CHAT_TEMPLATE = "chat_template.jinja"
_KEPT = ("model_type", "vocab_size", "is_encoder_decoder", "decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")

# Name of a special token here -> its keys in the files, in order of preference.
NAMES = {
    "unknown": ("unk_token",),
    "start": ("bos_token", "cls_token"),
    "end": ("eos_token", "sep_token"),
    "mask": ("mask_token",),
    "pad": ("pad_token",),
}
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Model type -> default names of special tokens, which files may omit.
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
_ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
DEFAULTS = {
    "bert": _BERT,
    "distilbert": _BERT,
    "modernbert": _BERT,
    "deberta-v2": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "gpt2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "t5": _T5,
    "mt5": _T5,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "qwen3_moe": _QWEN,
}


class PretrainedTokenizer:
    """A pretrained model's tokenizer, with its original files, so that an export has them byte for byte.

    Special tokens have the names of all tokenizers here, and `pad`; the files define them. For an encoder–decoder, `start` is
    the first token of a target.
    """

    def __init__(self, files: Mapping[str, bytes], config: Mapping[str, Any], where: str = "the tokenizer", added: Sequence[Added] = ()):
        """
        Args:
          files: name -> content, for names in `FILES`.
          config: the model's `config.json`.
          where: origin of the files, for errors.
          added: further tokens, whose ids follow those of the files.

        Raises:
          ConfigError: the files cannot be read; an added token is one of theirs; or the tokenizer has more tokens than the model's embedding
            has rows, and they were not added to its vocabulary.
        """
        self._files = {name: bytes(files[name]) for name in sorted(files) if name in FILES}
        self.config = {key: config[key] for key in _KEPT if config.get(key) is not None}
        check_values(self.config, where)
        self._settings = self._object("tokenizer_config.json")
        self._named = self._named_tokens()
        try:
            self._coder = make_coder(self._files, self._kind, self._settings, self._named, self._added())
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001  the libraries raise bare Exception
            raise ConfigError(f"config.data.tokenizer: {where} has files of a tokenizer that cannot be read: {error}") from error
        if self._coder is None:
            raise ConfigError(f"config.data.tokenizer: {where} has no supported tokenizer: {_missing(self._files, self._kind)}")
        self.published_tokens = self._coder.vocab_size
        self.rows = self.config.get("vocab_size", self.published_tokens)
        if not set(range(self.rows, self.published_tokens)) <= self._coder.added_ids():
            raise ConfigError(
                f"config.data.tokenizer: {where} has {self.published_tokens:,} tokens, its model rows for {self.rows:,} (vocab_size in config.json): they do not "
                "belong together. Use the tokenizer files that belong to these weights."
            )
        self._where, self.added = where, tuple((str(text), bool(special)) for text, special in added)
        self._coder = self._coder.with_added(self.added) if self.added else self._coder
        self.tokens = self._coder.vocab_size
        self.vocab_size = max(self.tokens, int(self.config.get("vocab_size", 0)))
        self._special = {name: self._find_special(name) for name in NAMES}

    @property
    def _kind(self) -> str:
        return str(self.config.get("model_type", ""))

    def encode(self, text: str) -> np.ndarray:
        """int32 [number of tokens], without special tokens; text that looks like one stays text."""
        return self._coder.encode(text)

    @property
    def cuttable(self) -> bool:
        """Whether a text may be encoded in parts."""
        return getattr(self._coder, "cuttable", False)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the tokens of each text, int32."""
        return self._coder.encode_batch(texts)

    def read(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text that contains special tokens by name; see `read_batch`."""
        return self.read_batch([text])[0]

    def read_batch(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode texts that contain special tokens by name, such as rendered chat templates; adds none.

        Returns:
          Of each text, int32 [tokens], and int32 [tokens, 2], the range of characters of each token.

        Raises:
          ConfigError: the tokenizer is a SentencePiece model alone, which cannot recognise special tokens in text.
        """
        return self._coder.read(texts)

    def decode(self, tokens) -> str:
        """Return text; special tokens by name, and nothing for rows of the embedding without a token."""
        tokens = np.asarray(tokens)
        wrong = tokens[(tokens < -1) | (tokens >= self.vocab_size)]
        if wrong.size:
            raise ValueError(f"{wrong.flat[0]} is not a token: the tokenizer has {self.vocab_size}, from 0 on")
        return self._coder.decode(tokens[(tokens >= 0) & (tokens < self.tokens)])

    def special(self, name: str) -> int | None:
        """Return the id of `unknown`, `start`, `end`, `mask` or `pad`, or None."""
        if name not in NAMES:
            raise ValueError(f"there is no special token {name!r}; there are {', '.join(NAMES)}")
        return self._special[name]

    @property
    def special_names(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and so on, by the names in the files: the variables of chat templates."""
        return {key: token for key, token in self._named.items() if token is not None and self._coder.token_to_id(token) is not None}

    @property
    def special_texts(self) -> list[str]:
        """All special tokens by name, those without a role too."""
        return self._coder.special_texts()

    @functools.cached_property
    def frame(self) -> tuple[np.ndarray, np.ndarray]:
        """The special tokens that the tokenizer adds before and after a text, both int32."""
        return _around(self._coder.frame.single)

    def wrap(self, text: str, pair: str | None = None, *, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text, or two, with the special tokens that the tokenizer adds: `[CLS] text [SEP]` for BERT.

        Args:
          text: the first text.
          pair: the second text.
          length: maximum number of tokens: texts are cut at their end, the longer one first; special tokens stay.

        Returns:
          Tokens and their types (0 for the first text, 1 for the second, if the model distinguishes them): both int32 [tokens].

        Raises:
          ValueError: `length` leaves no space for a token of the text.
        """
        return self.join([self.encode(text)] + ([] if pair is None else [self.encode(pair)]), length=length)

    def join(self, parts: Sequence[np.ndarray], *, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Do what `wrap` does with the tokens of one or two texts."""
        frame = self._coder.frame.single if len(parts) == 1 else self._coder.frame.pair
        if length is not None:
            limit = length - sum(not isinstance(token, str) for token, _ in frame)
            if limit < len(parts):
                raise ValueError(f"{length} tokens leave no space for a text between {length - limit} special tokens")
            parts = cut_longest(parts, limit)
        texts = dict(zip("AB", parts, strict=False))
        pieces = [texts[token] if isinstance(token, str) else [token] for token, _ in frame]
        types = [np.full(len(piece), kind) for piece, (_, kind) in zip(pieces, frame, strict=True)]
        return np.concatenate([[], *pieces]).astype(np.int32), np.concatenate([[], *types]).astype(np.int32)

    @property
    def chat_template(self) -> str | None:
        """The chat template, or None."""
        if CHAT_TEMPLATE in self._files:
            return self._files[CHAT_TEMPLATE].decode("utf-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}.get("default")
        return template if isinstance(template, str) else None

    def with_chat_template(self, template: str) -> "PretrainedTokenizer":
        """Return the tokenizer with another chat template."""
        return PretrainedTokenizer(self._files | {CHAT_TEMPLATE: template.encode("utf-8")}, self.config, self._where, self.added)

    def with_added(self, tokens: Sequence[Added]) -> "PretrainedTokenizer":
        """Return the tokenizer with further tokens, whose ids follow its own; ConfigError for one that it has."""
        return PretrainedTokenizer(self._files, self.config, self._where, (*self.added, *tokens))

    def files(self) -> dict[str, bytes]:
        """Return the original files, byte for byte; with added tokens, `tokenizer.json` is written anew."""
        return self._files | ({"tokenizer.json": self._coder.to_json().encode("utf-8")} if self.added else {})

    def has_tokens_of(self, files: Mapping[str, bytes]) -> bool:
        """Whether the files define the same vocabulary; settings and templates may differ."""
        return _vocabulary(self._files) == _vocabulary(files)

    def to_json(self) -> str:
        files = {name: _as_json(content) for name, content in self._files.items()}
        added = {"added": [list(token) for token in self.added]} if self.added else {}
        return json.dumps({"kind": "published", "config": self.config, "files": files, **added}, ensure_ascii=False)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "PretrainedTokenizer":
        """Return the tokenizer of the parsed JSON of `to_json`."""
        return cls({name: _from_json(content) for name, content in values["files"].items()}, values["config"], added=values.get("added", ()))

    def _object(self, name: str) -> dict:
        """Return the JSON object of a file, or {} if the file is missing."""
        if name not in self._files:
            return {}
        try:
            values = json.loads(self._files[name].decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"config.data.tokenizer: {name} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"config.data.tokenizer: {name} is no JSON object.")
        return values

    def _named_tokens(self) -> dict[str, str | None]:
        """Return the name of each special token: from the files, else the default of the model type. An explicit null means none."""
        named: dict[str, str | None] = dict(DEFAULTS.get(self._kind, {}))
        for source in (self._object("special_tokens_map.json"), self._settings):
            named |= {key: _content(source[key]) for key in _NAMED if key in source}
        if odd := [f"{key}={token!r}"[:80] for key, token in named.items() if not isinstance(token, str | None)]:
            raise ConfigError(f"config.data.tokenizer: its files set {odd[0]}, which is no text.")
        return named

    def _added(self) -> dict[int, dict]:
        """Return the tokens that other files add to `tokenizer.json`, by id, as keywords of `tokenizers.AddedToken`."""
        names = {name for name in self._named.values() if name}
        added = {}
        for name, number in self._object("added_tokens.json").items():
            added[int(number)] = {"content": name, "special": name in names, "normalized": False}
        for number, token in (self._settings.get("added_tokens_decoder") or {}).items():
            keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
            added[int(number)] = {key: token[key] for key in keys if key in token} if isinstance(token, dict) else {"content": token}
        if odd := [number for number in added if not 0 <= number < MOST_TOKENS]:
            raise ConfigError(f"config.data.tokenizer: its files add a token with the id {odd[0]}; ids are from 0 to {MOST_TOKENS - 1:,}.")
        return dict(sorted(added.items()))

    def _find_special(self, name: str) -> int | None:
        if name == "start" and (self.config.get("is_encoder_decoder") or self._kind in ("t5", "mt5")):
            # Without decoder_start_token_id, a target starts with padding, as T5's do.
            return self.config.get("decoder_start_token_id", self._find_special("pad"))
        for key in NAMES[name]:
            token, number = self._named.get(key, ""), self.config.get(f"{key}_id")
            if token is None:
                continue  # an explicit null
            found = self._coder.token_to_id(token)
            if found is None and isinstance(number, int) and 0 <= number < self.tokens:
                found = number
            if found is not None:
                return found
        return None


def from_reference(reference: str, data_dir: str | None) -> PretrainedTokenizer:
    """Return the tokenizer of a pretrained model.

    Args:
      reference: `hf:PATH_OR_ID`.
      data_dir: directory where a relative path is looked for after the working directory.

    Raises:
      ConfigError: no such model, or it has no supported tokenizer.
    """
    name = split_accepted(reference)[0].removeprefix("hf:")
    below = None if storage.has_scheme(name) or os.path.exists(name) or not data_dir else storage.join(data_dir, name)
    if below is not None and ("://" not in below or storage.has_scheme(below)) and storage.parse(below).exists():
        reference = f"hf:{below}{reference.removeprefix(f'hf:{name}')}"
    return from_folder(find(reference))


def from_folder(folder: Folder) -> PretrainedTokenizer:
    """Return the tokenizer in the folder of a pretrained model; ConfigError if it has none that is supported."""
    return PretrainedTokenizer(files_in(folder), folder.config, folder.reference)


def files_in(folder: Folder) -> dict[str, bytes]:
    """Return the files of a tokenizer in the folder of a pretrained model."""
    return {name: (folder.path / name).read_bytes() for name in FILES if (folder.path / name).is_file()}


def _vocabulary(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name not in ("tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)}


def _missing(files: Mapping[str, bytes], kind: str) -> str:
    there = [name for name in files if name not in ("tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)]
    shown = f"it has {', '.join(there)}, and its model_type is {kind!r}" if there else "it has none of its files"
    if kind == "deberta-v2":
        return (
            f"{shown}. An spm.model is not read: transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes its "
            "tokenizer.json, which is."
        )
    return (
        f"{shown}. Add its tokenizer.json; models without one are read from spiece.model or tokenizer.model (T5, Llama, Mistral), "
        "vocab.txt (BERT, DistilBERT), or vocab.json and merges.txt (GPT-2, RoBERTa, Qwen)."
    )


def _content(token: Any) -> str | None:
    """Return a special token's name, given as text or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _as_json(content: bytes) -> dict[str, str]:
    try:
        return {"text": content.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _from_json(content: Mapping[str, str]) -> bytes:
    return content["text"].encode("utf-8") if "text" in content else base64.b64decode(content["base64"])


def _around(single: Sequence[tuple[int | str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens before and after "A"."""
    tokens = [token for token, _ in single]
    place = tokens.index("A")
    return np.array(tokens[:place], np.int32), np.array(tokens[place + 1 :], np.int32)
