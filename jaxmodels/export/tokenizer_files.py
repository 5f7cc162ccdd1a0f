"""Write the tokenizer of a run as files that `transformers` reads."""

import json
from pathlib import Path
from typing import Any

import tokenizers as library
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from jaxmodels.pretrained.architecture import Architecture
from jaxmodels.runs.folder import RunFolder
from jaxmodels.tokenizers import factory as tokenizers
from jaxmodels.tokenizers.base import SPECIAL, Tokenizer
from jaxmodels.tokenizers.bpe import TokenizersTokenizer
from jaxmodels.tokenizers.pretrained import PretrainedTokenizer
from jaxmodels.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxmodels.tokenizers.simple import ByteTokenizer, CharacterTokenizer, WordTokenizer

_ROLES = {"unknown": "unk_token", "start": "bos_token", "end": "eos_token", "mask": "mask_token"}


def tokenizer_of(folder: RunFolder) -> Tokenizer | None:
    """Return the tokenizer of a text run, or None."""
    return tokenizers.from_json(folder.tokenizer_file.read_text(encoding="utf-8")) if folder.tokenizer_file.is_file() else None


def special_ids(tokenizer: Tokenizer, architecture: Architecture) -> dict[str, Any]:
    """Return the keys of config.json with the ids of special tokens."""
    if isinstance(tokenizer, PretrainedTokenizer):
        return {key: value for key, value in tokenizer.config.items() if key.endswith("_token_id")}
    start, end = tokenizer.special("start"), tokenizer.special("end")
    ids = {"bos_token_id": start, "eos_token_id": end}
    if architecture.name in ("t5", "mt5"):
        ids |= {"decoder_start_token_id": start, "pad_token_id": end}
    return ids


def write(folder: RunFolder, target: Path) -> list[str]:
    """Write a run's tokenizer into an export folder; return notes on differences."""
    tokenizer = tokenizer_of(folder)
    if tokenizer is None:
        return []
    if isinstance(tokenizer, PretrainedTokenizer):
        for name, content in tokenizer.files().items():
            (target / name).write_bytes(content)
        return []
    if isinstance(tokenizer, SentencePieceTokenizer):
        (target / "spiece.model").write_bytes(tokenizer.model_bytes())
        return ["The tokenizer is a SentencePiece model (spiece.model); read it with the sentencepiece library."]
    converted = library.Tokenizer.from_str(tokenizer.to_json()) if isinstance(tokenizer, TokenizersTokenizer) else _convert(tokenizer)
    converted.save(str(target / "tokenizer.json"))
    named = {role: converted.id_to_token(i) for name, role in _ROLES.items() if (i := tokenizer.special(name)) is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return ["Unlike in jaxmodels, text spelled like a special token, such as <end>, is encoded as that token."] if isinstance(tokenizer, WordTokenizer) else []


def _convert(tokenizer: CharacterTokenizer | ByteTokenizer | WordTokenizer) -> library.Tokenizer:
    """Convert a tokenizer of this package to the `tokenizers` library, with the same ids."""
    if isinstance(tokenizer, ByteTokenizer):
        names = _bytes_by_character()
        vocabulary = {name: i for i, name in enumerate([*tokenizer.names, *names])}
        result = library.Tokenizer(library.models.BPE(vocabulary, []))
        result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        result.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharacterTokenizer):
        vocabulary = {name: i for i, name in enumerate([*tokenizer.names, *tokenizer.alphabet])}
        result = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=SPECIAL[0] if tokenizer.names else "\0"))
        result.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        result.decoder = decoders.Fuse()
    else:
        vocabulary = {name: i for i, name in enumerate([*SPECIAL, *tokenizer.words])}
        result = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
        result.normalizer = normalizers.Lowercase() if tokenizer.lower else None
        result.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [name for name in SPECIAL if name in vocabulary]
    if special and not (isinstance(tokenizer, CharacterTokenizer) and not tokenizer.names):
        result.add_special_tokens(special)
    return result


def _bytes_by_character() -> list[str]:
    """Return byte-level BPE's character for each byte (Radford et al. 2019): itself if printable, else one from code point 256 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]
