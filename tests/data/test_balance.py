"""Classes equally often in training."""

import numpy as np
import pytest
import small_configs
from PIL import Image

import jaxmodels
from jaxmodels.data import balance, loader
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.runs.folder import RunFolder

COUNTS = {"a": 30, "b": 6, "c": 2}


def rows(folder):
    (folder / "train.tsv").write_text("".join(f"{name}{i}\t{name}\n" for name, count in COUNTS.items() for i in range(count)))
    return {"source": f"tsv:{folder}", "sequence_length": 4, "tokenizer": "byte", "holdout": 0.0, "header": False}


def pictures(folder):
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for i in range(count):
            Image.new("L", (4, 4), i).save(folder / name / f"{i}.png")
    return {"source": f"images:{folder}", "size": 4, "channels": 1, "holdout": 0.0}


def experiment(data, **more):
    task, model = ("classify_text", {"name": "lstm_encoder", "width": 4, "embedding": 4}) if "tokenizer" in data else ("classify", {"name": "cnn"})
    config = {"model": model, "task": {"name": task}, "data": data | {"batch_size": 6, "balance": True} | more}
    return config | {"optimizer": {"name": "sgd", "learning_rate": 0.1}, "training": {"epochs": 1}, "log": {"every": 1, "tensorboard": False}}


@pytest.mark.parametrize(
    ("make", "more"),
    [(rows, {}), (rows, {"indexed": True}), (rows, {"indexed": True, "on_bad_example": "skip"}), (pictures, {}), (pictures, {"memory_gb": 0.0})],
)
def test_an_epoch_has_each_class_as_often_as_the_largest(make, more, tmp_path):
    built = build_experiment(experiment(make(tmp_path), **more))
    train = built.dataset.splits["train"]
    labels = [int(train[i]["label"]) for i in range(len(train))]
    assert len(train) in range(88, 91) and max(np.bincount(labels)) - min(np.bincount(labels)) <= 1
    batch = loader.TrainingBatches(train, len(train), 1, seed=0, shuffle=True)[0]
    inputs = batch["tokens"] if "tokens" in batch else batch["image"]
    seen = {(int(label), x.tobytes()) for label, x in zip(batch["label"], inputs, strict=True)}
    assert len(seen) == sum(COUNTS.values()), "every example is seen"
    assert "train: each of 3 classes equally often" in built.dataset.notes[-1] and "(30, 6, 2)" in built.dataset.notes[-1]


def test_it_resumes_exactly(tmp_path):
    (tmp_path / "data").mkdir()
    config = experiment(rows(tmp_path / "data")) | {"training": {"steps": 6}, "checkpoint": {"every": 3}}
    jaxmodels.train(config, str(tmp_path / "whole"), quiet=True)
    jaxmodels.train(config | {"training": {"steps": 3}}, str(tmp_path / "parts"), quiet=True)
    jaxmodels.train(config, str(tmp_path / "parts"), quiet=True)
    one, other = ([(line["step"], line["loss"]) for line in RunFolder(tmp_path / name).metrics("train")] for name in ("whole", "parts"))
    assert one == other and len(one) == 6


def test_labels_that_are_no_classes(tmp_path):
    data = rows(tmp_path) | {"label": "none"}
    with pytest.raises(ConfigError, match=r"config\.data\.balance needs examples with one class each"):
        build_experiment(experiment(data))
    with pytest.raises(ConfigError, match="data.shuffle_window must not be set with it"):
        build_experiment(experiment(rows(tmp_path), indexed=True, shuffle_window=2))
    assert balance.labels_of(object()) is None
    assert build_experiment(small_configs.config(small_configs.CNN, data__balance=True)).dataset.splits["train"]
