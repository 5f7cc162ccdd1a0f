"""Augmentation on the device: closed forms, labels mixed as the pixels, deterministic by key, off in evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import augment
from jaxmodels.tasks.classify import Classify

INFO = {"image_shape": (6, 8, 3), "num_classes": 4}


def images(batch=32, height=6, width=8):
    return jax.random.uniform(jax.random.key(1), (batch, height, width, 3), minval=0.1)


def test_a_crop_is_a_window_of_the_padded_image():
    image = images()
    got = np.asarray(augment.random_crop(jax.random.key(0), image, 2))
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = set()
    for one, whole in zip(got, padded, strict=True):
        found = [(i, j) for i in range(5) for j in range(5) if (whole[i : i + 6, j : j + 8] == one).all()]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 10 and {i for i, _ in places} == {j for _, j in places} == set(range(5)), "every shift occurs"


def test_a_flip_mirrors_about_half_of_the_images_and_twice_is_nothing():
    image = images(64)
    got = augment.random_flip(jax.random.key(0), image)
    same = np.asarray((got == image).all((1, 2, 3)))
    mirrored = np.asarray((got == image[:, :, ::-1]).all((1, 2, 3)))
    assert (same ^ mirrored).all() and 16 < same.sum() < 48
    np.testing.assert_array_equal(augment.random_flip(jax.random.key(0), got), image)


def test_mixup_is_a_weighted_mean_of_pixels():
    image, share = np.asarray(images(4)), np.array([0.0, 0.25, 0.6, 1.0], np.float32)
    expected = [s * image[i] + (1 - s) * image[i - 1] for i, s in enumerate(share)]
    np.testing.assert_allclose(augment.mixup(jnp.asarray(image), jnp.asarray(share)), expected, rtol=1e-6)


def test_cutmix_pastes_a_rectangle_of_the_area_it_reports():
    B, H, W = 200, 12, 16
    image = jnp.broadcast_to(jnp.arange(B, dtype=jnp.float32)[:, None, None, None], (B, H, W, 3))
    wanted = jnp.linspace(0, 1, B)
    got, share = map(np.asarray, augment.cutmix(jax.random.key(0), image, wanted))
    own = got[..., 0] == np.arange(B)[:, None, None]
    np.testing.assert_array_equal(got[..., 0], np.where(own, np.arange(B)[:, None, None], (np.arange(B)[:, None, None] - 1) % B))
    np.testing.assert_allclose(share, own.mean((1, 2)), rtol=1e-6)
    for n in range(B):
        rows, columns = np.flatnonzero(~own[n].all(1)), np.flatnonzero(~own[n].all(0))
        assert (~own[n]).sum() == len(rows) * len(columns), "a rectangle"
        if len(rows):
            assert np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns)
            side = np.sqrt(1 - float(wanted[n]))
            inner = 0 < rows[0] and rows[-1] < H - 1 and 0 < columns[0] and columns[-1] < W - 1
            assert len(rows) <= H * side + 1e-4 and len(columns) <= W * side + 1e-4, "no larger than asked"
            assert not inner or (len(rows), len(columns)) == (int(H * side + 1e-4), int(W * side + 1e-4)), "cut off by the border alone"
    assert share[-1] == 1 and (share >= np.asarray(wanted) - 1e-6).all()


@pytest.mark.parametrize(("mixup", "cutmix", "probability"), [(0.4, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 0.5), (1.0, 1.0, 0.0)])
def test_the_share_that_mix_reports_is_the_share_of_the_pixels(mixup, cutmix, probability):
    # Constant images of one of two values: the mean of an image gives the share of its own pixels.
    B = 400
    image = jnp.broadcast_to((jnp.arange(B) % 2 * 1.0)[:, None, None, None], (B, 8, 8, 3))
    got, share = map(np.asarray, augment.mix(jax.random.key(0), image, mixup_alpha=mixup, cutmix_alpha=cutmix, probability=probability))
    own = np.arange(B) % 2
    np.testing.assert_allclose(got.mean((1, 2, 3)), share * own + (1 - share) * (1 - own), atol=1e-5)
    pasted = np.isin(got, (0, 1)).all((1, 2, 3)) & (share < 1)
    blended = ~np.isin(got, (0, 1)).all((1, 2, 3))
    assert abs((share < 1).mean() - probability) <= (0.15 if probability else 0), "how many are mixed (a few cutmix rectangles are empty)"
    assert (pasted.sum() > 60) == bool(cutmix and probability) and (blended.sum() > 60) == bool(mixup and probability)


class Recorder(nnx.Module):
    """A model that returns given logits and records its images."""

    def __init__(self, logits):
        self.logits, self.seen = jnp.asarray(logits), []

    def __call__(self, image, *, rngs=None):
        self.seen.append(np.asarray(image))
        return self.logits


def batch(n=400, dtype=np.float32):
    image = np.asarray(images(n))
    image = (image * 255).astype(np.uint8) if dtype == np.uint8 else image
    return {"image": jnp.asarray(image), "label": jnp.arange(n) % 4, "weight": jnp.ones(n)}


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0, "crop": 2, "flip": True}])
def test_labels_are_mixed_as_the_images_are(options):
    """The loss is the mean of the two labels' losses by the shares that `mix` gives for the same key."""
    logits = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    task = Classify(INFO, label_smoothing=0.1, **options)
    total, weight, metrics = task.loss(Recorder(logits), batch(), nnx.Rngs(dropout=3))
    rngs = nnx.Rngs(dropout=3)
    for _ in range(2 * ("crop" in options)):
        rngs.dropout()
    _, share = augment.mix(rngs.dropout(), batch()["image"], mixup_alpha=options.get("mixup", 0), cutmix_alpha=options.get("cutmix", 0), probability=1.0)
    share, label = np.asarray(share), np.arange(400) % 4
    exact = -(share * log_p[np.arange(400), label] + (1 - share) * log_p[np.arange(400), np.roll(label, 1)])
    np.testing.assert_allclose(metrics["loss"][0], exact.sum(), rtol=1e-5)
    np.testing.assert_allclose(total, (0.9 * exact - 0.1 * log_p.mean(-1)).sum(), rtol=1e-5)
    assert weight == 400 and metrics["accuracy"][0] == (logits.argmax(-1) == label).sum()


def test_the_same_key_gives_the_same_images_and_evaluation_changes_none():
    task = Classify(INFO, crop=2, flip=True, mixup=1.0, cutmix=1.0)
    model = Recorder(np.zeros((400, 4), np.float32))
    for seed in (3, 3, 4):
        task.loss(model, batch(dtype=np.uint8), nnx.Rngs(dropout=seed))
    task.evaluate(model, batch(dtype=np.uint8), None)
    task.predict(model, batch(dtype=np.uint8))
    first, again, other, evaluated, predicted = model.seen
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != evaluated).any()
    for seen in (evaluated, predicted):
        np.testing.assert_allclose(seen, np.asarray(batch(dtype=np.uint8)["image"]) / 255, rtol=1e-6)


def test_images_are_normalised_by_channel_in_training_and_evaluation():
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 0.5)
    task = Classify(INFO, mean=mean, std=std)
    model = Recorder(np.zeros((400, 4), np.float32))
    task.loss(model, batch(), nnx.Rngs(dropout=0))
    task.evaluate(model, batch(), None)
    for seen in model.seen:
        np.testing.assert_allclose(seen, (np.asarray(batch()["image"]) - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mean": (0.5,)}, "3 channels"), ({"std": (1.0, 0.0, 1.0)}, "above 0"), ({"mixup": -1.0}, "task.mixup"), ({"mix_probability": 1.5}, "0, 1")],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        Classify(INFO, **options)
