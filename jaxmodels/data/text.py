"""Text as windows of tokens, for language models."""

from typing import Literal

import numpy as np

from jaxmodels.data.source import Dataset, find_file, fingerprint
from jaxmodels.data.tokenizers import ByteTokenizer, CharacterTokenizer
from jaxmodels.errors import ConfigError

PAD = -1  # a target that does not count


class Windows:
    """Windows of `length + 1` consecutive tokens (inputs, and the same one later), one every `stride`.

    With `cover`, the windows lie end to end, the last is padded with -1, and every token but the first is a
    target exactly once. Without, only whole windows count.
    """

    in_memory = True

    def __init__(self, tokens: np.ndarray, length: int, stride: int, *, cover: bool = False):
        self.tokens, self.length = tokens, length
        self.stride = length if cover else stride
        if cover:
            self.count = -(-(len(tokens) - 1) // length)
            padded = self.count * length + 1
            self.tokens = np.concatenate([tokens, np.full(padded - len(tokens), PAD, tokens.dtype)])
        else:
            self.count = max(0, (len(tokens) - 1 - length) // stride + 1)

    def __len__(self):
        return self.count

    def fingerprint(self):
        return fingerprint(self.tokens, np.array([self.length, self.stride]))

    def __getitem__(self, index):
        return {key: value[0] for key, value in self.take(np.array([index])).items()}

    def take(self, indices):
        starts = np.asarray(indices)[:, None] * self.stride
        return {"tokens": self.tokens[starts + np.arange(self.length + 1)]}


def text(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int,
    tokenizer: Literal["character", "byte"] = "character",
    stride: int | None = None,
    holdout: float = 0.1,
) -> Dataset:
    """A text file, UTF-8.

    Args:
      path: absolute, or relative to the working directory or else to the data directory.
      data_dir: the data directory.
      sequence_length: tokens that a model reads in one example.
      tokenizer: `character` (an alphabet made of the whole text) or `byte`.
      stride: tokens between the starts of two training windows; `sequence_length` unless given. With 1, an epoch
        has a window starting at every token.
      holdout: share of the text, at its end, that validates.

    Raises:
      ConfigError: the file is missing or not UTF-8, or a part is shorter than one window.
    """
    found = find_file(path, data_dir)
    try:
        with open(found, encoding="utf-8", newline="") as file:
            content = file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{found} is not UTF-8 text: byte {error.start}: {error.reason}.") from error
    return from_string(content, found, sequence_length, tokenizer, stride, holdout)


def python_docs(
    *,
    sequence_length: int,
    tokenizer: Literal["character", "byte"] = "character",
    stride: int | None = None,
    holdout: float = 0.1,
) -> Dataset:
    """English that every Python ships: the help topics of the language reference, `pydoc_data.topics`, by title.

    Its length differs a little between Python versions (3.11: 464,970 characters). Arguments as those of `text`.
    """
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[title] for title in sorted(topics))
    return from_string(content, "pydoc_data.topics", sequence_length, tokenizer, stride, holdout)


def from_string(content: str, where: str, sequence_length: int, tokenizer: str, stride: int | None, holdout: float) -> Dataset:
    """Splits, tokenises and cuts a text; `where` names it in errors."""
    if sequence_length < 1 or (stride is not None and stride < 1):
        raise ConfigError(f"config.data: sequence_length and stride must be at least 1, got {sequence_length} and {stride}.")
    if not 0 < holdout < 1:
        raise ConfigError(f"config.data.holdout must lie between 0 and 1, got {holdout}.")
    if not content:
        raise ConfigError(f"config.data.source: {where} is empty.")
    coder = ByteTokenizer() if tokenizer == "byte" else CharacterTokenizer(content)
    tokens = coder.encode(content)
    cut = int(len(tokens) * (1 - holdout))
    splits = {
        "train": Windows(tokens[:cut], sequence_length, stride or sequence_length),
        "validation": Windows(tokens[cut:], sequence_length, sequence_length, cover=True),
    }
    if not len(splits["train"]) or len(tokens) - cut < 2:
        raise ConfigError(
            f"config.data: {where} has {len(tokens)} tokens, {cut} of them for training: less than one window of "
            f"sequence_length={sequence_length} (and a target)."
        )
    return Dataset(splits, {"vocab_size": coder.vocab_size, "tokenizer": coder})
