"""Several classes of a row: data, loss and scores against PyTorch and scikit-learn, training, export and import."""

import json

import jax.numpy as jnp
import numpy as np
import pretrained_folders
import pytest
from PIL import Image
from sklearn import metrics

import jaxmodels
from jaxmodels.data.inspect import inspect
from jaxmodels.data.registry import open_dataset
from jaxmodels.errors import ConfigError
from jaxmodels.export.transformers import export_run
from jaxmodels.runs.folder import RunFolder
from jaxmodels.tasks.several_classes import SeveralClassesOfText

INFO = {"vocab_size": 5, "num_classes": 3, "labels": ["a", "b", "c"], "several_classes": True}
TEXT = {"sequence_length": 8, "tokenizer": "byte", "holdout": 0.0, "label": "classes"}


def classes(dataset, split="train"):
    rows = (dataset.splits[split][i]["label"] for i in range(len(dataset.splits[split])))
    return [[dataset.info["labels"][j] for j in np.flatnonzero(row)] for row in rows]


@pytest.mark.parametrize("indexed", [False, True])
def test_names_of_classes_from_texts_and_lists(indexed, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\none,joy|fear\ntwo, fear \nthree,\n")
    dataset = open_dataset(f"csv_rows:{tmp_path}/rows.csv", TEXT | {"indexed": indexed}, None)
    assert classes(dataset) == [["fear", "joy"], ["fear"], []] and dataset.info["several_classes"] and dataset.info["num_classes"] == 2
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "label": ["joy", "fear"]}\n{"text": "two", "label": []}\n')
    dataset = open_dataset(f"jsonl:{tmp_path}/rows.jsonl", TEXT | {"indexed": indexed, "labels": ("joy", "fear", "awe")}, None)
    assert classes(dataset) == [["joy", "fear"], []] and dataset.splits["train"][0]["label"].tolist() == [1, 1, 0]
    report = inspect({"data": {"source": f"jsonl:{tmp_path}/rows.jsonl", **TEXT}})
    assert report["splits"]["train"]["labels"] == {"fear": 1, "joy": 1} and report["examples"][0]["label"] == "fear, joy"
    bad = {"names a class twice": '["a", "a"]', "not names of classes": "3.5", "the class 'sad' is none of fear, joy. ": '["sad"]'}
    for problem, value in bad.items():
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "one", "label": ["joy", "fear"]}}\n{{"text": "two", "label": {value}}}\n')
        with pytest.raises(ConfigError, match=f"line 2: .*{problem.strip()}"):
            dataset = open_dataset(f"jsonl:{tmp_path}/rows.jsonl", TEXT | {"indexed": indexed, "labels": ("fear", "joy")}, None)
            classes(dataset)


def test_loss_and_scores_are_those_of_pytorch_and_scikit_learn():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    logits, label = generator.normal(size=(40, 3)).astype(np.float32), (generator.random((40, 3)) < 0.4).astype(np.float32)
    batch = {"tokens": jnp.zeros((40, 2), jnp.int32), "label": jnp.asarray(label), "weight": jnp.ones(40)}
    model = lambda tokens, rngs: jnp.asarray(logits)  # noqa: E731
    for weights in (None, (1.0, 3.0, 0.5)):
        total, weight, _ = SeveralClassesOfText(INFO, positive_weights=weights).loss(model, batch, None)
        positive = None if weights is None else torch.tensor(weights)
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(label), pos_weight=positive)
        assert float(total / weight) == pytest.approx(wanted.item(), rel=1e-5)
    task = SeveralClassesOfText(INFO, threshold=0.4)
    found = task.score({name: np.asarray(x) for name, x in task.outputs(model, batch, None).items()})
    predicted = 1 / (1 + np.exp(-logits)) >= 0.4
    for name, average in (("f1", "micro"), ("macro_f1", "macro")):
        assert found[name] == pytest.approx(metrics.f1_score(label, predicted, average=average))
    assert found["exact_match"] == pytest.approx(metrics.accuracy_score(label, predicted))


def test_each_task_asks_for_its_kind_of_data(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\none,joy|fear\ntwo,fear\n")
    for task, label, problem in (
        ("classify_text", "classes", "use the task 'several_classes_of_text'"),
        ("several_classes_of_text", "class", "one class a row"),
    ):
        data = {"source": f"csv_rows:{tmp_path}/rows.csv", "batch_size": 2, **TEXT, "label": label}
        config = {"model": {"name": "lstm_encoder", "width": 4, "embedding": 4}, "task": {"name": task}, "data": data}
        with pytest.raises(ConfigError, match=problem):
            jaxmodels.train(config | {"optimizer": {"name": "sgd", "learning_rate": 0.1}, "training": {"steps": 1}}, str(tmp_path / "run"), quiet=True)


def test_texts_are_learned_exported_and_imported(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder = pretrained_folders.bert(tmp_path / "bert")
    rows = [("good and long", "good|long"), ("good", "good"), ("long", "long"), ("none of it", "")] * 8
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    data = {"source": f"csv_rows:{tmp_path}/rows.csv", "batch_size": 8, **TEXT, "sequence_length": 16, "tokenizer": f"hf:{folder}", "holdout": 0.25}
    config = {"init_from": f"hf:{folder}", "model": {"dropout": 0.0}, "task": {"name": "several_classes_of_text"}, "data": data}
    config |= {"optimizer": {"name": "adam", "learning_rate": 3e-3}, "training": {"steps": 60}, "log": {"tensorboard": False}, "checkpoint": {"best": "f1"}}
    jaxmodels.train(config, str(tmp_path / "run"), quiet=True)
    assert RunFolder(tmp_path / "run").metrics("validation")[-1]["f1"] == 1.0
    exported = export_run(str(tmp_path / "run"), str(tmp_path / "exported"))
    assert json.loads((exported / "config.json").read_text())["problem_type"] == "multi_label_classification"
    run, again = jaxmodels.load(str(tmp_path / "run")), jaxmodels.load(f"hf:{exported}")
    tokens = run.tokenizer.wrap("good and long")[0][None]
    with torch.no_grad():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(exported).eval()(torch.tensor(tokens)).logits
    np.testing.assert_allclose(run.predict({"tokens": tokens}), torch.sigmoid(theirs).numpy(), atol=1e-5)
    np.testing.assert_allclose(again.predict({"tokens": tokens}), torch.sigmoid(theirs).numpy(), atol=1e-5)


def test_a_published_regression_is_no_classification(tmp_path):
    folder = pretrained_folders.bert(tmp_path / "bert", with_head=True, num_labels=1, problem_type="regression")
    run = jaxmodels.load(f"hf:{folder}")
    found = run.predict({"tokens": run.tokenizer.wrap("a text")[0][None]})
    assert found.shape == (1,) and found[0] != 1.0


@pytest.mark.slow
def test_images_are_learned(tmp_path):
    for i in range(16):
        left, right = i % 2 * 255, i // 2 % 2 * 255
        pixels = np.zeros((8, 8), np.uint8)
        pixels[:, :4], pixels[:, 4:] = left, right
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    lines = [{"image": f"{i}.png", "label": ["left"] * (i % 2) + ["right"] * (i // 2 % 2)} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": f"jsonl:{tmp_path}", "image_column": "image", "size": 8, "channels": 1, "label": "classes", "holdout": 0.25, "batch_size": 4}
    config = {
        "model": {"name": "cnn", "features": (4,), "hidden": 8, "dropout": 0.0},
        "task": {"name": "several_classes", "mean": (0.5,), "std": (0.5,)},
        "data": data,
    }
    config |= {"optimizer": {"name": "adam", "learning_rate": 0.02}, "training": {"steps": 40}, "log": {"tensorboard": False}}
    jaxmodels.train(config, str(tmp_path / "run"), quiet=True)
    assert RunFolder(tmp_path / "run").metrics("validation")[-1]["exact_match"] == 1.0
