"""Transcription of frames: decoding and scores by hand, the data against its digits, and a training run."""

import difflib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models import create
from jaxmodels.models.functional import merge
from jaxmodels.tasks import losses
from jaxmodels.tasks.transcribe import Transcribe, edit_distance

INFO = {"frame_width": 2, "num_labels": 3}


class FixedOutputs(nnx.Module):
    """Return logits whose argmax is `classes`, [B, T]."""

    def __init__(self, classes):
        self.classes = jnp.asarray(classes)

    def __call__(self, frames, *, valid=None, rngs=None):
        return 5.0 * jax.nn.one_hot(self.classes, 4)


def test_repeats_blanks_and_padding_are_left_out():
    task = Transcribe(INFO)
    model = FixedOutputs([[0, 0, 3, 0, 1, 1, 2], [3, 2, 2, 3, 3, 1, 1]])
    target = jnp.array([[0, 0, 1, 2], [2, 1, -1, -1]])
    batch = {"frames": jnp.zeros((2, 7, 2)), "length": jnp.array([7, 5]), "target": target, "weight": jnp.array([1.0, 0.25])}
    outputs = jax.device_get(jax.jit(lambda batch: task.outputs(model, batch, None))(batch))
    assert [row[row >= 0].tolist() for row in outputs["predicted"]] == [[0, 0, 1, 2], [2]]
    assert task.score(outputs) == {"label_error_rate": pytest.approx(1 / 6), "exact_match": 0.5}
    total, weight, metrics = jax.jit(lambda batch: task.loss(model, batch, None))(batch)
    by_row = losses.ctc(model(None), target, valid=jnp.arange(7) < jnp.array([[7], [5]]), blank=3)
    np.testing.assert_allclose([total, weight], [by_row[0] + by_row[1] / 4, 1.25], rtol=1e-6)
    assert metrics["loss"] == (total, weight)


def test_edit_distance():
    distance = lambda one, other: edit_distance(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))  # noqa: E731
    assert distance(b"kitten", b"sitting") == 3 and distance(b"flaw", b"lawn") == 2
    assert distance(b"", b"abc") == distance(b"abc", b"") == 3 and distance(b"abc", b"abc") == 0
    random = np.random.default_rng(0)
    for _ in range(20):  # at least the difference in length, at most the tokens outside of common blocks
        one, other = (bytes(random.integers(97, 100, random.integers(0, 9)).tolist()) for _ in range(2))
        kept = sum(block.size for block in difflib.SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks())
        assert abs(len(one) - len(other)) <= distance(one, other) == distance(other, one) <= len(one) + len(other) - 2 * kept


def test_lines_are_digits_of_their_split_side_by_side():
    lines = open_dataset("digit_lines", {"longest": 3, "examples": 40, "held_out": 7}, None)
    digits = open_dataset("digits", {}, None)
    assert {name: len(split) for name, split in lines.splits.items()} == {"train": 40, "validation": 7, "test": 7}
    for name, split in lines.splits.items():
        known = {(image[:, :, 0].T.tobytes(), label) for image, label in zip(*map(digits.splits[name].arrays.get, ("image", "label")), strict=True)}
        for line in (split[i] for i in range(len(split))):
            assert line["frames"].shape == (33, 8) and not line["frames"][line["length"] :].any()
            start = 0
            for label in line["target"][line["target"] >= 0]:
                # The first column of a digit may be empty, so the known digit decides where it begins.
                places = range(start, start + 4)
                found = [at for at in places if (line["frames"][at : at + 8].tobytes(), label) in known]
                assert found and not line["frames"][start : found[0]].any()
                start = found[0] + 8
            assert start == line["length"]
    with pytest.raises(ConfigError, match="longest"):
        open_dataset("digit_lines", {"longest": 0}, None)


def test_padding_changes_nothing():
    model = create("lstm_frames", 2, ("tokens", 4), width=5, rngs=nnx.Rngs(0))
    frames = jax.random.normal(jax.random.key(0), (2, 6, 2))
    valid = jnp.arange(6) < jnp.array([[6], [4]])
    run = nnx.jit(lambda model, frames: model(frames, valid=valid))
    one, other = (run(model, jnp.where(valid[:, :, None], frames, padding)) for padding in (0.0, 7.0))
    np.testing.assert_array_equal(one[valid], other[valid])
    assert np.ptp(one[valid]) > 0


@pytest.mark.slow
def test_a_model_learns_to_transcribe():
    config = {
        "model": {"name": "gru_frames", "width": 24},
        "task": {"name": "transcribe"},
        "data": {"source": "digit_lines", "longest": 2, "batch_size": 64, "eval_batch_size": 500},
        "optimizer": {"name": "adam", "learning_rate": 1e-2, "clip_norm": 1.0},
        "training": {"steps": 150},
    }
    experiment = build_experiment(config)
    state = jax.jit(experiment.init_function())(jax.random.key(0))
    step = jax.jit(experiment.step_function(), donate_argnums=0)
    train, test = experiment.dataset.splits["train"], experiment.dataset.splits["test"]
    for i in range(experiment.steps):
        state, _ = step(state, get_batch(train, np.arange(64 * i, 64 * i + 64) % len(train)) | {"weight": np.ones(64, np.float32)}, jax.random.key(1))
    model = merge(experiment.graph, state.params, state.stats)
    outputs = jax.jit(lambda batch: experiment.task.outputs(model, batch, None))(get_batch(test, np.arange(len(test))))
    assert experiment.task.score(jax.device_get(outputs))["label_error_rate"] < 0.25
