"""The source of random examples: a function of (seed, split, index), uniform over its range, without memory."""

import numpy as np
import pytest
import small_configs

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment

TOKENS = {"kind": "tokens", "sequence_length": 32, "vocab_size": 50, "examples": 400}
IMAGES = {"kind": "images", "image_shape": (5, 7, 3), "num_classes": 4, "examples": 400}


def test_tokens_are_a_function_of_seed_split_and_index():
    one, again = (open_dataset("synthetic", TOKENS | {"validation": 3}, None).splits for _ in range(2))
    other = open_dataset("synthetic", TOKENS | {"source_seed": 1}, None).splits
    whole = get_batch(one["train"], np.arange(400))["tokens"]
    assert whole.shape == (400, 33) and whole.dtype == np.int32 and (whole.min(), whole.max()) == (0, 49)
    np.testing.assert_array_equal(whole[[7, 3]], get_batch(again["train"], np.array([7, 3]))["tokens"])
    assert (whole[:3] != get_batch(one["validation"], np.arange(3))["tokens"]).mean() > 0.9
    assert (whole[:3] != get_batch(other["train"], np.arange(3))["tokens"]).mean() > 0.9
    assert len({row.tobytes() for row in whole}) == 400
    counts = np.bincount(whole.ravel(), minlength=50)
    # Chi-squared with 49 degrees of freedom: mean 49, deviation 10.
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 110


def test_images_are_uniform_over_pixels_and_labels():
    dataset = open_dataset("synthetic", IMAGES, None)
    assert dataset.info == {"image_shape": (5, 7, 3), "num_classes": 4} and list(dataset.splits) == ["train"]
    batch = get_batch(dataset.splits["train"], np.arange(400))
    assert batch["image"].shape == (400, 5, 7, 3) and batch["image"].dtype == np.uint8
    assert abs(batch["image"].mean() - 127.5) < 1.5 and (batch["image"].min(), batch["image"].max()) == (0, 255)
    assert batch["label"].dtype == np.int32 and (np.bincount(batch["label"], minlength=4) > 60).all()


def test_special_tokens_are_never_drawn_and_can_be_requested():
    dataset = open_dataset("synthetic", TOKENS | {"special": True}, None)
    tokens, tokenizer = get_batch(dataset.splits["train"], np.arange(400))["tokens"], dataset.info["tokenizer"]
    assert (tokens.min(), tokens.max()) == (4, 49) and tokenizer.vocab_size == 50 and tokenizer.special("mask") < 4
    assert tokenizer.encode(tokenizer.decode(tokens[0])).tolist() == tokens[0].tolist()


def test_many_examples_need_no_memory_and_an_index_past_the_end_is_an_error():
    source = open_dataset("synthetic", TOKENS | {"examples": 10**12}, None).splits["train"]
    assert len(source) == 10**12 and source[10**12 - 1]["tokens"].shape == (33,)
    with pytest.raises(IndexError):
        source[10**12]
    fewer = open_dataset("synthetic", TOKENS, None).splits["train"]
    assert source.fingerprint() != fewer.fingerprint() == open_dataset("synthetic", TOKENS, None).splits["train"].fingerprint()


def test_a_task_accepts_them():
    base = small_configs.config(small_configs.GPT, data={"source": "synthetic", "sequence_length": 16, "vocab_size": 30, "batch_size": 16}, model__context=16)
    assert build_experiment(base).batch_shapes(4)["tokens"].shape == (4, 17)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": None}, "vocab_size is required"),
        ({"num_classes": 3}, "num_classes has no effect"),
        ({"vocab_size": 4, "special": True}, "above 4"),
        ({"examples": 0}, "at least 1"),
        ({"source_seed": -1}, "at least 0"),
    ],
)
def test_options_without_examples_are_errors(change, message):
    with pytest.raises(ConfigError, match=message):
        open_dataset("synthetic", TOKENS | change, None)
    with pytest.raises(ConfigError, match="image_shape is"):
        open_dataset("synthetic", IMAGES | {"image_shape": (5, 7)}, None)
