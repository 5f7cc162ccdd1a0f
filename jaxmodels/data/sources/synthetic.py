"""Random tokens and images, made on reading: for measurements of speed, and for models that are too large to train here."""

from typing import Literal

import numpy as np

from jaxmodels.data.source import Dataset, fingerprint
from jaxmodels.errors import ConfigError
from jaxmodels.tokenizers.base import SPECIAL
from jaxmodels.tokenizers.simple import WordTokenizer

_SPLITS = ("train", "validation", "test")


class Synthetic:
    """Examples that are a function of (seed, split, index), and not stored."""

    def __init__(self, kind: str, examples: int, seed: tuple[int, int], shape: tuple[int, ...], first: int, values: int):
        """
        Args:
          kind: `tokens` or `images`.
          examples: number of examples.
          seed: the source's seed, and the number of the split.
          shape: shape of an example's tokens or image.
          first: the smallest token.
          values: one more than the largest token or label.
        """
        self.kind, self.examples, self.seed, self.shape, self.first, self.values = kind, examples, seed, shape, first, values

    def __len__(self):
        return self.examples

    def __getitem__(self, index):
        if not 0 <= index < self.examples:
            raise IndexError(f"there is no example {index} of {self.examples}")
        # Raw bits of a bit generator are the same in every numpy version.
        bits = np.random.PCG64([*self.seed, int(index)])
        if self.kind == "tokens":
            drawn = bits.random_raw(self.shape) % np.uint64(self.values - self.first)
            return {"tokens": drawn.astype(np.int32) + np.int32(self.first)}
        size = int(np.prod(self.shape))
        pixels = bits.random_raw(-(-size // 8)).astype("<u8").view(np.uint8)[:size].reshape(self.shape)
        return {"image": pixels, "label": np.int32(bits.random_raw() % self.values)}

    def fingerprint(self):
        return fingerprint(np.array([self.kind == "tokens", self.examples, *self.seed, self.first, self.values, *self.shape]))


def synthetic(
    *,
    kind: Literal["tokens", "images"] = "tokens",
    examples: int = 1_000_000,
    validation: int = 0,
    test: int = 0,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
    special: bool = False,
    image_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    source_seed: int = 0,
) -> Dataset:
    """Make up uniformly random examples, to measure the speed of reading and training.

    Examples: of tokens `tokens` int32 [sequence_length + 1]; of images `image` uint8 [height, width, channels] and `label` int32.

    Args:
      kind: `tokens` or `images`.
      examples: examples of the train split.
      validation, test: examples of those splits; 0 for none.
      sequence_length: with `tokens`: tokens that a language model reads in one example.
      vocab_size: with `tokens`: number of different tokens.
      special: with `tokens`: whether the first four are special tokens, which no text has; `info` then has a tokenizer of made-up
        words, which masked language modelling needs.
      image_shape: with `images`: (height, width, channels).
      num_classes: with `images`: number of labels.
      source_seed: seed of the examples.

    Raises:
      ConfigError: an option is missing, belongs to the other kind, or is out of range.
    """
    own = {
        "tokens": {"sequence_length": sequence_length, "vocab_size": vocab_size},
        "images": {"image_shape": image_shape, "num_classes": num_classes},
    }
    for name, value in own[kind].items():
        if value is None:
            raise ConfigError(f"config.data.{name} is required: 'synthetic' makes {kind} of any size.")
    for other in own:
        for name, value in own[other].items():
            if other != kind and value is not None:
                raise ConfigError(f"config.data.{name} has no effect with data.kind={kind!r}.")
    if special and kind != "tokens":
        raise ConfigError(f"config.data.special has no effect with data.kind={kind!r}.")
    if examples < 1 or min(validation, test, source_seed) < 0:
        raise ConfigError(
            f"config.data: examples must be at least 1, validation, test and source_seed at least 0; got {examples}, {validation}, {test}, {source_seed}."
        )
    first = len(SPECIAL) if special else 0
    if kind == "tokens":
        if sequence_length < 1 or not first < vocab_size <= 2**31:
            raise ConfigError(f"config.data: sequence_length must be at least 1 and vocab_size above {first}, got {sequence_length} and {vocab_size}.")
        shape, values, info = (sequence_length + 1,), vocab_size, {"vocab_size": vocab_size}
        if special:
            info["tokenizer"] = WordTokenizer(f"word{i}" for i in range(first, vocab_size))
    else:
        if len(image_shape) != 3 or min(*image_shape, num_classes) < 1:
            raise ConfigError(f"config.data: image_shape is (height, width, channels), and num_classes at least 1; got {image_shape} and {num_classes}.")
        shape, values, info = tuple(image_shape), num_classes, {"image_shape": tuple(image_shape), "num_classes": num_classes}
    sizes = dict(zip(_SPLITS, (examples, validation, test), strict=True))
    splits = {name: Synthetic(kind, size, (source_seed, number), shape, first, values) for number, (name, size) in enumerate(sizes.items()) if size}
    return Dataset(splits, info)
