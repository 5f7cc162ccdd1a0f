"""Encoders of pretrained models' tokenizers: a `tokenizers.Tokenizer` built from the files that exist, or a SentencePiece model."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxmodels.errors import ConfigError, optional_import
from jaxmodels.tokenizers.base import Added
from jaxmodels.tokenizers.bpe import TokenizersTokenizer, add, panics_are_errors

SENTENCEPIECE = ("spiece.model", "tokenizer.model")
_NEED_A_FILE = (
    "need a tokenizer.json, and this one is a SentencePiece model alone. Load it with transformers' AutoTokenizer and save it again: that writes one."
)
_MOST_EXTRA_IDS = 10_000  # T5 has 100
# Qwen's pre-tokenization: contractions, letters, single digits, punctuation, line breaks, spaces.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Frame:
    """Positions of the special tokens that a tokenizer adds.

    Attributes:
      single: for one text: (token, or "A" for the text; its type) in order.
      pair: for two texts, "A" and "B".
    """

    single: tuple[tuple[int | str, int], ...]
    pair: tuple[tuple[int | str, int], ...]


class _Library(TokenizersTokenizer):
    """A tokenizer of the `tokenizers` library, and the special tokens that it adds."""

    def __init__(self, tokenizer: library.Tokenizer):
        serialized = tokenizer.to_str()
        super().__init__(serialized)
        self._serialized = serialized
        self.frame = _frame_of(json.loads(serialized).get("post_processor"))

    @functools.cached_property
    def _reader(self) -> library.Tokenizer:
        reader = library.Tokenizer.from_str(self._serialized)
        reader.no_padding()
        reader.no_truncation()
        return reader

    def read(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        with panics_are_errors():
            found = self._reader.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(each.ids, np.int32), np.array(each.offsets, np.int32).reshape(-1, 2)) for each in found]

    def decode(self, tokens) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def with_added(self, tokens: Sequence[Added]) -> "_Library":
        """Return the tokenizer with further tokens."""
        tokenizer = library.Tokenizer.from_str(self._serialized)
        add(tokenizer, tokens)
        return _Library(tokenizer)

    def to_json(self) -> str:
        return self._serialized

    def added_ids(self) -> set[int]:
        """Return the ids of tokens that were added to the vocabulary."""
        return set(self._tokenizer.get_added_tokens_decoder())

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def special_texts(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]


class _SentencePiece:
    """A SentencePiece model, and tokens added after its own."""

    def __init__(self, model: bytes, added: Mapping[int, Mapping], frame: Sequence[str]):
        """frame: `A` and the names of special tokens around it."""
        self._processor = optional_import("sentencepiece", "text").SentencePieceProcessor(model_proto=model)
        own = self._processor.vocab_size()
        self._added = {number: token["content"] for number, token in added.items() if number >= own}
        self._ids = {token: number for number, token in self._added.items()}
        self.vocab_size = max([own, *(number + 1 for number in self._added)])
        single = tuple((token if token == "A" else self.token_to_id(token), 0) for token in frame)
        self.frame = Frame(single, (*single, *(("B" if token == "A" else token, kind) for token, kind in single)))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def read(self, texts: Sequence[str]):
        raise ConfigError(f"config.data.tokenizer: conversations {_NEED_A_FILE}")

    def with_added(self, tokens: Sequence[Added]):
        raise ConfigError(f"config.data.tokenizer: added tokens {_NEED_A_FILE}")

    def added_ids(self) -> set[int]:
        """Return the ids of tokens that were added to the model's."""
        return set(self._added)

    def decode(self, tokens) -> str:
        parts, run = [], []
        for token in [*np.asarray(tokens).tolist(), None]:
            control = token is not None and (token in self._added or token >= self._processor.vocab_size() or self._processor.is_control(token))
            if token is not None and not control:
                run.append(token)
                continue
            parts += [self._processor.decode(run)] if run else []
            run = []
            if token is not None:
                parts.append(self._added.get(token) or self._processor.id_to_piece(token))
        return "".join(parts)

    def token_to_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        number = self._processor.piece_to_id(token)
        return None if number == self._processor.unk_id() and self._processor.id_to_piece(number) != token else number

    def special_texts(self) -> list[str]:
        own = (number for number in range(self._processor.vocab_size()) if self._processor.is_control(number))
        return [*(self._processor.id_to_piece(number) for number in own), *self._ids]


def make_coder(files: Mapping[str, bytes], kind: str, settings: Mapping, named: Mapping[str, str | None], added: Mapping[int, Mapping]):
    """Return the encoder of a tokenizer's files, or None if none of the files is of a supported format."""
    if "tokenizer.json" in files:
        tokenizer = library.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    else:
        model = next((name for name in SENTENCEPIECE if name in files), None)
        if model is not None and kind in ("t5", "mt5", "llama", "mistral", "mixtral"):
            return _SentencePiece(files[model], _with_extra_ids(files[model], kind, settings, added), _sentencepiece_frame(kind, settings, named))
        tokenizer = _from_vocabulary(files, kind, settings, named)
        if tokenizer is None:
            return None
    _add(tokenizer, added)
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):  # the settings override the normalizer
        for key, option in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"), ("tokenize_chinese_chars", "handle_chinese_chars")):
            if key in settings:
                setattr(normalizer, option, settings[key])
        tokenizer.normalizer = normalizer
    return _Library(tokenizer)


def _add(tokenizer: library.Tokenizer, added: Mapping[int, Mapping]) -> None:
    """Add tokens of files other than `tokenizer.json` to the vocabulary."""
    for number, token in added.items():
        there = tokenizer.token_to_id(token["content"])
        if there is None:
            tokenizer.add_tokens([library.AddedToken(**token)])
            there = tokenizer.token_to_id(token["content"])
        if there != number:
            raise ConfigError(
                f"config.data.tokenizer: its files disagree: the token {token['content']!r} is {there} in the vocabulary and {number} in "
                "tokenizer_config.json or added_tokens.json. Use files of one model."
            )


def _start_and_end(tokenizer: library.Tokenizer, settings: Mapping, named: Mapping[str, str | None]) -> library.processors.PostProcessor:
    """Return a post-processor that adds the special tokens of `add_bos_token` and `add_eos_token`."""
    start, end = (named.get(f"{key}_token") if settings.get(f"add_{key}_token") else None for key in ("bos", "eos"))
    before, after = ([token] if token else [] for token in (start, end))
    first = [*before, "$A", *after]
    second = [*(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
    special = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
    return library.processors.TemplateProcessing(single=first, pair=first + second, special_tokens=special)


def _from_vocabulary(files: Mapping[str, bytes], kind: str, settings: Mapping, named: Mapping[str, str | None]) -> library.Tokenizer | None:
    """Return the tokenizer of a vocabulary without `tokenizer.json`, by the rules of its model type."""
    if kind in ("bert", "distilbert") and "vocab.txt" in files:
        lines = files["vocab.txt"].decode("utf-8").removesuffix("\n").split("\n")
        vocabulary = {line.removesuffix("\r"): number for number, line in enumerate(lines)}
        tokenizer = library.Tokenizer(models.WordPiece(vocabulary, unk_token=named["unk_token"], max_input_chars_per_word=100))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
    elif kind in ("gpt2", "roberta", "qwen2", "qwen3", "qwen3_moe") and {"vocab.json", "merges.txt"} <= files.keys():
        merges = [tuple(line.split(" ")) for line in files["merges.txt"].decode("utf-8").splitlines() if line and not line.startswith("#version")]
        tokenizer = library.Tokenizer(models.BPE(vocab=json.loads(files["vocab.json"]), merges=merges))
        spaced = bool(settings.get("add_prefix_space", False))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
        if kind.startswith("qwen"):
            tokenizer.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(library.Regex(_QWEN_WORDS), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        return None
    known = dict.fromkeys(token for token in named.values() if token is not None)
    tokenizer.add_special_tokens([library.AddedToken(token, special=True, normalized=False, lstrip=token == "<mask>") for token in known])
    if kind in ("bert", "distilbert", "roberta"):
        before, after = named["cls_token"], named["sep_token"]
        special = [(token, tokenizer.token_to_id(token)) for token in (before, after)]
        second = [after, "$B", after] if kind == "roberta" else ["$B:1", f"{after}:1"]
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[before, "$A", after], pair=[before, "$A", after, *second], special_tokens=special
        )
    else:
        tokenizer.post_processor = _start_and_end(tokenizer, settings, named)
    return tokenizer


def _with_extra_ids(model: bytes, kind: str, settings: Mapping, added: Mapping[int, Mapping]) -> Mapping[int, Mapping]:
    """Return the added tokens with T5's sentinels, which follow its pieces in descending order."""
    if kind != "t5" or any("<extra_id_" in token["content"] for token in added.values()):
        return added
    first = optional_import("sentencepiece", "text").SentencePieceProcessor(model_proto=model).vocab_size()
    count = settings.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= _MOST_EXTRA_IDS:
        raise ConfigError(f"config.data.tokenizer: extra_ids={str(count)[:80]} in tokenizer_config.json is not a whole number from 0 to {_MOST_EXTRA_IDS:,}.")
    return {**added, **{first + count - 1 - i: {"content": f"<extra_id_{i}>"} for i in range(count)}}


def _sentencepiece_frame(kind: str, settings: Mapping, named: Mapping[str, str | None]) -> list[str]:
    if kind in ("t5", "mt5"):
        return ["A", named["eos_token"]]
    start = [named["bos_token"]] if settings.get("add_bos_token", True) else []
    return [*start, "A", *([named["eos_token"]] if settings.get("add_eos_token", False) else [])]


def _frame_of(processor: Mapping | None) -> Frame:
    """Return the special tokens that a post-processor of the `tokenizers` library adds, from its JSON.

    Raises:
      ConfigError: its type is not supported.
    """
    kind = None if processor is None else processor.get("type")
    if kind in (None, "ByteLevel"):
        return Frame((("A", 0),), (("A", 0), ("B", 1)))
    if kind == "Sequence":
        frames = [_frame_of(part) for part in processor["processors"]]
        return next((frame for frame in frames if len(frame.single) > 1), frames[0])
    if kind in ("BertProcessing", "RobertaProcessing"):
        before, after = processor["cls"][1], processor["sep"][1]
        single = ((before, 0), ("A", 0), (after, 0))
        return Frame(single, (*single, ("B", 1), (after, 1)) if kind == "BertProcessing" else (*single, (after, 0), ("B", 0), (after, 0)))
    if kind != "TemplateProcessing":
        raise ConfigError(f"config.data.tokenizer: its post-processor is {kind!r}; supported are TemplateProcessing, BertProcessing, RobertaProcessing.")

    def flat(parts):
        for part in parts:
            for name, value in part.items():
                if name == "Sequence":
                    yield value["id"], value["type_id"]
                else:
                    yield from ((number, value["type_id"]) for number in processor["special_tokens"][value["id"]]["ids"])

    return Frame(tuple(flat(processor["single"])), tuple(flat(processor["pair"])))
