"""Tokenizers of the kinds of pretrained models, trained on a few lines, and folders with their files in present and older formats."""

import io
import json
from pathlib import Path

import tokenizers
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "The quick brown fox jumps over the lazy dog. Ünïcödé, naïve café!",
    "it's what we'll do: don't stop, THE END (of 1,234.5 things)",
    "the cat sat on the mat with a hat and the dog ran after the cat",
    "東京 is a city; 你好 世界 🙂 emoji",
    "def f(x):\n    return x + 1\n\n\tand more  spaces   here",
] * 4
# Case, accents (composed and decomposed), CJK, emoji, leading and inner whitespace, digits, contractions, text like special tokens.
TRICKY = [
    "Hello World", " leading space", "  two leading", "trailing ", "a  b   c",
    "\ttab\nnewline\r\nreturn\n\n", "naïve café Ünïcödé", "e\u0301le\u0301gant",
    "東京都に住む 你好", "🙂🙃👩‍👩‍👧", "don't we'll I'M", "12345 3.14 1,000",
    "x\u00a0y\u200bz\u3000w", "[SEP] <s> </s> <|endoftext|> [MASK]", "ﬁne ½ Å", "", "ＦＵＬＬ width", "unk: \u0e01\u0e02",
]  # fmt: skip

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def wordpiece(lower=True) -> tokenizers.Tokenizer:
    """Return a tokenizer like BERT's."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=BERT_SPECIAL, show_progress=False))
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids)
    return tokenizer


def words(*tokens: str) -> tokenizers.Tokenizer:
    """Return a tokenizer of these words; the second is the unknown one."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def byte_level(special, roberta=False) -> tokenizers.Tokenizer:
    """Return a tokenizer like GPT-2's or RoBERTa's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    if roberta:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def unigram(extra=4) -> tokenizers.Tokenizer:
    """Return a tokenizer like T5's, with `extra` sentinels."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(LINES, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False))
    tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(extra))])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def metaspace_bpe() -> tokenizers.Tokenizer:
    """Return a tokenizer like Llama 2's: BPE with byte fallback."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False))
    values = json.loads(tokenizer.to_str())  # bytes must be normal tokens, not special ones
    values["added_tokens"] = [token for token in values["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(values))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece_model(kind: str) -> bytes:
    """Return a SentencePiece model: `unigram` like T5's, or `bpe` like Llama 2's."""
    import sentencepiece

    options = {
        "unigram": {"vocab_size": 120, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False},
        "bpe": {
            "vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "hard_vocab_limit": False, "split_digits": True,
        },
    }[kind]  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, minloglevel=2, **options)
    return model.getvalue()


def write(folder, files: dict) -> Path:
    """Write files by name, each text, bytes, or a dictionary for JSON; return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
