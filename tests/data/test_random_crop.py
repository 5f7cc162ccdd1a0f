"""Random resized crops on the host: windows by their definition, of all pixels of an image, that depend on seed and position alone."""

import copy

import numpy as np
import pytest
from PIL import Image
from small_configs import CNN

from jaxmodels.data import loader
from jaxmodels.data.random_crop import RandomResizedCrop
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import Arrays, get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment

CROP = RandomResizedCrop()


def smooth(height, width):
    """Return a colour image whose red and green values are those of its row and column, in units of 1 / 255 of its size."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 7)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of different sizes in two classes, one of them lying on its side."""
    root = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate([(60, 90), (200, 40), (48, 48), (64, 128), (100, 30), (90, 60)]):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        image, exif = Image.fromarray(smooth(height, width)), Image.Exif()
        if i == 5:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(root / "ab"[i % 2] / f"{i}.png", exif=exif)
    return root


def batches(source, seed=5, rows=None, size=4, crop=CROP):
    return loader.TrainingBatches(source, size, 40, seed=0, shuffle=True, rows=rows, crop=lambda *a: crop.read(*a, seed=seed))


def test_windows_have_the_areas_and_ratios_that_are_asked_for_and_lie_anywhere():
    crop = RandomResizedCrop(scale=(0.2, 0.5), ratio=(0.5, 2.0))
    windows = np.array([crop.window(400, 300, 3, position) for position in range(4000)])
    left, top, right, bottom = windows.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 400).all() and (bottom <= 300).all()
    area, ratio = (right - left) * (bottom - top) / 120_000, (right - left) / (bottom - top)
    assert 0.195 < area.min() and area.max() < 0.505 and 0.49 < ratio.min() and ratio.max() < 2.05
    inside = (ratio > 0.6) & (ratio < 1.5)  # windows that fit at any area
    np.testing.assert_allclose(np.quantile(area[inside], [0.1, 0.5, 0.9]), [0.23, 0.35, 0.47], atol=0.02)
    halves = np.log(ratio[area < 0.3])  # these fit at any ratio
    np.testing.assert_allclose(np.quantile(halves, [0.25, 0.5, 0.75]), np.log(2) * np.array([-0.5, 0, 0.5]), atol=0.06)
    np.testing.assert_allclose(np.mean(left / (401 - (right - left))), 0.5, atol=0.02)
    np.testing.assert_allclose(np.mean(top / (301 - (bottom - top))), 0.5, atol=0.02)
    assert [list(crop.window(400, 300, 3, p)) for p in range(9)] == windows[:9].tolist()
    assert [list(crop.window(400, 300, 4, p)) for p in range(9)] != windows[:9].tolist()
    whole = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert whole.window(50, 50, 0, 0) == (0, 0, 50, 50)
    assert whole.window(90, 30, 0, 0) == (30, 0, 60, 30) and whole.window(30, 90, 0, 0) == (0, 30, 30, 60), "the middle, where no window fits"


def test_images_are_cut_from_all_their_pixels(folder):
    """The crop equals one of the file, cut and scaled by Pillow alone; evaluation images are not cropped."""
    crop, size = RandomResizedCrop(scale=(0.1, 0.4)), (24, 16)
    dataset = open_dataset(f"images:{folder}", {"size": size, "scale_to": 32, "holdout": 0.0}, None)
    train = dataset.splits["train"]
    source = batches(train, crop=crop)
    for step in (0, 7):
        batch, positions = source[step], np.arange(4) + 4 * step
        for image, index, position in zip(batch["image"], source.indices(4 * step, 4 * step + 4), positions, strict=True):
            with Image.open(train.rows[int(index)].values["image"]) as file:
                pixels = np.rot90(np.asarray(file), -1) if file.getexif().get(0x0112) == 6 else np.asarray(file)
            left, top, right, bottom = crop.window(pixels.shape[1], pixels.shape[0], 5, int(position))
            wanted = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right])).resize(size[::-1], Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(image, np.asarray(wanted))
    plain = loader.EvaluationBatches(train, 6)[0]["image"]
    np.testing.assert_array_equal(plain, np.stack([train[i]["image"] for i in range(6)]))


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_a_batch_is_a_function_of_seed_and_step_for_any_reader(folder, kind):
    source = Arrays({"image": np.stack([smooth(20, 30)] * 6), "label": np.arange(6)})
    if kind == "files":
        source = open_dataset(f"images:{folder}", {"size": 16, "holdout": 0.0}, None).splits["train"]
    late = batches(source)[13]
    assert late["image"].shape[1:] == source[0]["image"].shape and late["image"].dtype == np.uint8
    np.testing.assert_array_equal(late["image"], [batches(source)[s] for s in range(14)][-1]["image"])
    np.testing.assert_array_equal(late["image"], np.concatenate([batches(source, rows=part)[13]["image"] for part in np.arange(4).reshape(2, 2)]))
    np.testing.assert_array_equal(late["image"], np.concatenate([batches(source, size=2)[step]["image"] for step in (26, 27)]))
    np.testing.assert_array_equal(late["image"], next(loader.read_ahead(batches(source), start=13, threads=3, workers=0, buffer=2))["image"])
    assert (late["image"] != batches(source, seed=6)[13]["image"]).any()
    examples = source if kind == "arrays" else [source[i] for i in range(6)]
    assert all((late["image"][i] != examples[int(index)]["image"]).any() for i, index in enumerate(batches(source).indices(52, 56)))


def test_a_broken_image_stays_one(folder, tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(smooth(30, 30)).save(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:60])
    source = open_dataset(f"images:{tmp_path}", {"size": 16, "holdout": 0.0, "on_bad_example": "skip"}, None).splits["train"]
    batch = batches(source, size=2)[0]
    assert sorted(batch["skipped"].tolist()) == [0, 1] and (batch["image"][batch["skipped"] == 1] == 0).all()


def test_it_is_a_key_of_the_data(folder):
    config = copy.deepcopy(CNN)
    config["data"] = {"source": f"images:{folder}", "size": 16, "batch_size": 4, "holdout": 0.3, "random_resized_crop": {"scale": [0.5, 1.0]}}
    experiment = build_experiment(config)
    train, validation = experiment.dataset.splits["train"], experiment.dataset.splits["validation"]
    assert type(train).__name__ == "EncodedRows" and type(validation).__name__ == "CachedSource", "what is cropped is not cached"
    first = experiment.crop(lambda indices: get_batch(train, indices), np.array([0, 0]), np.array([0, 1]))["image"]
    assert first.shape == (2, 16, 16, 3) and (first[0] != first[1]).any()
    config["data"] = {"source": "arrays", "batch_size": 4, "random_resized_crop": {}}
    images = {"image": np.zeros((8, 8, 8, 1), np.uint8), "label": np.arange(8) % 3}
    assert build_experiment(config, data={"train": images}).reading(Arrays(images))["threads"] == 16
    with pytest.raises(ConfigError, match="images of bytes"):
        build_experiment(config, data={"train": images | {"image": np.zeros((8, 8, 8, 1), np.float32)}})
    for key, value in (("scale", [0.5]), ("scale", [0.5, 1.5]), ("scale", [0, 1]), ("ratio", [2, 1])):
        config["data"]["random_resized_crop"] = {key: value}
        with pytest.raises(ConfigError, match=f"random_resized_crop.{key}"):
            build_experiment(config, data={"train": images})
