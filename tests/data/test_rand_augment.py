"""RandAugment: each operation against its closed form, and images that depend on seed and position alone."""

import copy

import numpy as np
import pytest
from PIL import Image
from small_configs import CNN

from jaxmodels.data import loader
from jaxmodels.data.rand_augment import OPERATIONS, RandAugment
from jaxmodels.data.source import Arrays
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment

PIXELS = np.random.default_rng(0).integers(10, 240, (8, 12, 3)).astype(np.uint8)


def apply(name, strength, sign=1, pixels=PIXELS):
    return np.asarray(OPERATIONS[name](Image.fromarray(pixels), strength, sign)).astype(int)


def test_operations_on_pixels_equal_their_closed_forms():
    x = PIXELS.astype(int)
    np.testing.assert_array_equal(apply("identity", 1.0), x)
    np.testing.assert_array_equal(apply("solarize", 1.0), 255 - x)
    np.testing.assert_array_equal(apply("solarize", 0.5), np.where(x < 128, x, 255 - x))
    np.testing.assert_array_equal(apply("posterize", 1.0), x // 16 * 16)
    np.testing.assert_array_equal(apply("posterize", 0.5), x // 4 * 4)
    np.testing.assert_allclose(apply("brightness", 1 / 3), np.minimum(x * 1.3, 255), atol=1)
    np.testing.assert_allclose(apply("brightness", 1 / 3, -1), x * 0.7, atol=1)
    grey = np.asarray(Image.fromarray(PIXELS).convert("L")).astype(float)
    np.testing.assert_allclose(apply("color", 1.0, -1), 0.1 * x + 0.9 * grey[..., None], atol=1)
    np.testing.assert_allclose(apply("contrast", 1.0, -1), 0.1 * x + 0.9 * round(grey.mean()), atol=1)
    stretched = apply("auto_contrast", 0.3)
    np.testing.assert_allclose(stretched, (x - x.min((0, 1))) * 255 / np.ptp(x, (0, 1)), atol=1)
    flat = apply("equalize", 0.3)
    assert (np.argsort(flat[..., 0].ravel(), kind="stable") == np.argsort(x[..., 0].ravel(), kind="stable")).mean() > 0.5
    blurred = apply("sharpness", 1.0, -1)
    assert np.abs(np.diff(blurred[1:-1, 1:-1], axis=1)).mean() < np.abs(np.diff(x[1:-1, 1:-1], axis=1)).mean()


def test_geometric_operations_shift_rotate_and_shear():
    x = PIXELS.astype(int)
    shifted = apply("translate_x", 10 / 18)  # 0.45 * 10/18 * 12 = 3 pixels
    np.testing.assert_array_equal(shifted[:, :-3], x[:, 3:])
    assert (shifted[:, -3:] == 128).all()
    back = apply("translate_y", 10 / 18, -1)  # 2 pixels
    np.testing.assert_array_equal(back[2:], x[:-2])
    assert (back[:2] == 128).all()
    square = np.full((33, 33, 1), 200, np.uint8)[..., 0]
    square[16, 28] = 0  # twelve pixels right of the centre
    row, column = np.unravel_index(apply("rotate", 1.0, 1, square).argmin(), square.shape)
    np.testing.assert_allclose([16 - row, column - 16], [12 * np.sin(np.pi / 6), 12 * np.cos(np.pi / 6)], atol=1)
    column = np.full((20, 20), 255, np.uint8)
    column[:, 10] = 0
    places = apply("shear_x", 1.0, 1, column).argmin(1)
    np.testing.assert_allclose(places, 10 - 0.3 * (np.arange(20) + 0.5), atol=1)
    np.testing.assert_array_equal(apply("shear_y", 1.0, 1, column.T.copy()).argmin(0), places)


def test_draws_depend_on_seed_and_position_and_take_every_operation():
    augment = RandAugment(operations=2)
    draws = [augment.draw(3, position) for position in range(700)]
    assert draws == [augment.draw(3, position) for position in range(700)]
    assert draws != [augment.draw(4, position) for position in range(700)]
    counts = np.bincount([number for draw in draws for number, _ in draw], minlength=14)
    assert ((counts - 100) ** 2 / 100).sum() < 45  # chi-squared with 13 degrees of freedom: above 45 with a probability of 1 / 50,000
    assert abs(np.mean([sign for draw in draws for _, sign in draw])) < 0.1


def test_a_batch_is_a_function_of_seed_and_step_for_any_reader():
    source = Arrays({"image": np.stack([PIXELS] * 30), "label": np.arange(30)})

    def make(seed=5, rows=None):
        def transform(batch, positions):
            return RandAugment(magnitude=20.0).batch(batch, positions, seed=seed)

        return loader.TrainingBatches(source, 8, 20, seed=0, shuffle=True, rows=rows, transform=transform)

    late = make()[13]
    np.testing.assert_array_equal(late["image"], [make()[s] for s in range(14)][-1]["image"])
    np.testing.assert_array_equal(late["image"], np.concatenate([make(rows=part)[13]["image"] for part in np.arange(8).reshape(2, 4)]))
    streamed = next(loader.read_ahead(make(), start=13, threads=3, workers=0, buffer=2))
    np.testing.assert_array_equal(late["image"], streamed["image"])
    assert late["image"].dtype == np.uint8 and (late["image"] != PIXELS).any((1, 2, 3)).sum() >= 5
    assert (late["image"] != make(seed=6)[13]["image"]).any()
    again = [{int(i): image.tobytes() for i, image in zip(b["label"], b["image"], strict=True)} for b in (make()[s] for s in range(15))]
    first = {k: v for b in again[:3] for k, v in b.items()}
    assert any(first[k] != v for b in again[8:] for k, v in b.items() if k in first), "another epoch, another draw"


def test_wrong_configs_are_errors():
    config = copy.deepcopy(CNN)
    config["data"]["rand_augment"] = {"magnitude": 5}
    with pytest.raises(ConfigError, match="images of bytes"):
        build_experiment(config)
    config["data"] = {"source": "arrays", "batch_size": 4, "rand_augment": {"magnitude": 5}}
    images = {"image": np.zeros((8, 8, 8, 1), np.uint8), "label": np.arange(8) % 3}
    experiment = build_experiment(config, data={"train": images})
    assert experiment.transform(images, np.arange(8))["image"].shape == (8, 8, 8, 1)
    assert experiment.reading(experiment.dataset.splits["train"])["threads"] == 16
    for key, value in (("magnitude", 31), ("operations", 0)):
        config["data"]["rand_augment"] = {key: value}
        with pytest.raises(ConfigError, match=f"rand_augment.{key}"):
            build_experiment(config, data={"train": images})
