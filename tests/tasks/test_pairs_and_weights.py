"""Two texts as one, weights of classes and weights of rows: against transformers and PyTorch, and against rows that are repeated."""

import jax
import jax.numpy as jnp
import numpy as np
import pretrained_folders
import pytest
import small_configs

import jaxmodels
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.source import get_batch
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.models.functional import new_rngs
from jaxmodels.runs.folder import RunFolder
from jaxmodels.tasks.classify import Classify
from jaxmodels.tasks.classify_text import ClassifyText

PAIRS = [("a cat sat", "on the mat"), ("is it so", "it is not so at all I think"), ("the very long first text goes on and on", "short")]


def rows(folder, name="pairs.csv", labels=(0, 1, 1)):
    text = "one,two,label\n" + "".join(f"{one},{two},{label}\n" for (one, two), label in zip(PAIRS, labels, strict=True))
    (folder / name).write_text(text)
    return f"csv_rows:{folder / name}"


def options(tokenizer, length):
    return {"text_column": "one", "pair_column": "two", "sequence_length": length, "tokenizer": tokenizer, "holdout": 0.0}


@pytest.mark.parametrize("length", [40, pytest.param(12, marks=pytest.mark.slow)])  # the second cuts the longer of the two
def test_two_texts_are_those_of_transformers(length, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = pretrained_folders.bert(tmp_path / "model", with_head=True, type_vocab_size=2, initializer_range=0.5)
    dataset = open_dataset(rows(tmp_path), options(f"hf:{folder}", length), None)
    batch = get_batch(dataset.splits["train"], np.arange(3))
    theirs = transformers.BertTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    wanted = theirs(*map(list, zip(*PAIRS, strict=True)), padding="max_length", truncation="longest_first", max_length=length, return_tensors="pt")
    if length == 40:
        np.testing.assert_array_equal(np.where(wanted["attention_mask"], wanted["input_ids"], -1), batch["tokens"])
        np.testing.assert_array_equal(wanted["token_type_ids"], batch["types"])
    else:
        assert (batch["tokens"] >= 0).sum(1).max() == length and dataset.notes[-1].startswith("2 of 3 examples")
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    tokens, types = torch.tensor(batch["tokens"]), torch.tensor(batch["types"])
    with torch.no_grad():
        logits = model(input_ids=tokens.clamp(min=0), attention_mask=(tokens >= 0).long(), token_type_ids=types).logits
    ours = jaxmodels.load(f"hf:{folder}")
    ours.task.batch = {}
    found = ours.predict({"tokens": batch["tokens"], "types": batch["types"]})
    np.testing.assert_allclose(found, torch.softmax(logits, -1).numpy(), atol=1e-5)
    assert np.abs(found - ours.predict({"tokens": batch["tokens"]})).max() > 1e-4  # without types it is another model


@pytest.mark.parametrize("indexed", [False, True])
def test_a_tokenizer_of_ones_own_puts_its_end_between(indexed, tmp_path):
    dataset = open_dataset(rows(tmp_path), options("word:100", 8) | {"indexed": indexed}, None)
    row = dataset.splits["train"][0]
    end = dataset.info["tokenizer"].special("end")
    assert row["tokens"].tolist().index(end) == 3 and row["types"].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert dataset.info["pairs"] is True
    with pytest.raises(ConfigError, match="has no token for the start and the end of a target"):
        open_dataset(rows(tmp_path), options("byte", 8), None)
    with pytest.raises(ConfigError, match="tokens, where 7 fit"):
        dataset = open_dataset(rows(tmp_path), options("word:100", 8) | {"truncate": False, "indexed": indexed}, None)
        list(map(dataset.splits["train"].__getitem__, range(3)))


BERT, LSTM = {"name": "bert-tiny", "layers": 1, "width": 8, "heads": 2, "context": 16}, {"name": "lstm_encoder", "width": 8, "embedding": 8}
REST = [("classify_text", LSTM), ("regress_text", BERT), ("regress_text", LSTM)]


@pytest.mark.parametrize(("task", "model"), [("classify_text", BERT), *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_tasks_of_two_texts_train(task, model, tmp_path):
    """Also models that do not tell the two apart."""
    data = {"source": rows(tmp_path), "batch_size": 2} | options("word:100", 16) | {"label": "value" if task == "regress_text" else "class", "validation": None}
    config = {"model": model, "task": {"name": task}, "data": data, "optimizer": {"name": "adam", "learning_rate": 0.01}, "training": {"steps": 3}}
    jaxmodels.train(config | {"log": {"tensorboard": False}}, str(tmp_path / "run"), quiet=True)
    assert RunFolder(tmp_path / "run").metrics("train")


# Weights


def test_weights_of_classes_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    logits, label = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0], np.int32)
    weights = (0.5, 2.0, 0.0)
    task = ClassifyText({"vocab_size": 5, "num_classes": 3}, class_weights=weights)
    batch = {"tokens": jnp.zeros((6, 2), jnp.int32), "label": jnp.asarray(label), "weight": jnp.ones(6)}
    total, weight, metrics = task.loss(lambda tokens, rngs: jnp.asarray(logits), batch, None)
    wanted = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(label).long(), weight=torch.tensor(weights)).item()
    assert float(total / weight) == pytest.approx(wanted, rel=1e-6)
    plain = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(label).long()).item()
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(plain, rel=1e-6)  # metrics count each example once


@pytest.mark.slow
def test_weights_of_classes_of_images_and_mixed_ones():
    info = {"image_shape": (4, 4, 1), "num_classes": 2}
    batch = {"image": jax.random.uniform(jax.random.key(0), (4, 4, 4, 1)), "label": jnp.array([0, 1, 1, 0]), "weight": jnp.ones(4)}
    model = lambda image, rngs: jnp.stack([image.sum((1, 2, 3)), -image.sum((1, 2, 3))], 1)  # noqa: E731
    for more in ({}, {"mixup": 0.2}):
        even, plain = (Classify(info, class_weights=w, **more).loss(model, batch, new_rngs(0))[:2] for w in ((3.0, 3.0), None))
        assert float(even[0] / even[1]) == pytest.approx(float(plain[0] / plain[1]), rel=1e-5) and float(even[1]) == pytest.approx(12.0)
    one, other = (Classify(info, class_weights=w).loss(model, batch, None)[1] for w in ((1.0, 0.0), (0.0, 1.0)))
    assert float(one) == float(other) == 2.0


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, float("nan"))])
def test_wrong_weights_of_classes_are_errors(weights):
    with pytest.raises(ConfigError, match=r"config\.task\.class_weights=.*each of the 2 classes, no, yes"):
        ClassifyText({"vocab_size": 5, "num_classes": 2, "labels": ["no", "yes"]}, class_weights=weights)


@pytest.mark.parametrize("indexed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_row_of_weight_two_counts_as_two_rows(indexed, tmp_path):
    lines = [("good film", 1, 2), ("bad film", 0, 1), ("so so", 1, 0)]
    (tmp_path / "weighted.csv").write_text("text,label,w\n" + "".join(f"{t},{y},{w}\n" for t, y, w in lines))
    (tmp_path / "repeated.csv").write_text("text,label\n" + "".join(f"{t},{y}\n" * w for t, y, w in lines))
    losses = []
    for name, more in (("weighted", {"weight_column": "w", "indexed": indexed}), ("repeated", {})):
        data = {
            "source": f"csv_rows:{tmp_path}/{name}.csv",
            "sequence_length": 4,
            "tokenizer": "byte",
            "holdout": 0.0,
            "batch_size": 3,
            "shuffle": False,
            **more,
        }
        config = {"model": {"name": "lstm_encoder", "width": 4, "embedding": 4, "dropout": 0.0}, "task": {"name": "classify_text"}, "data": data}
        config |= {"optimizer": {"name": "sgd", "learning_rate": 0.5}, "training": {"steps": 4}, "log": {"every": 1, "tensorboard": False}}
        jaxmodels.train(config, str(tmp_path / f"{name}{indexed}"), quiet=True)
        losses.append([line["loss"] for line in RunFolder(tmp_path / f"{name}{indexed}").metrics("train")])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("weight", ["-1", "inf", "much", ""])
def test_wrong_weights_of_rows_are_bad_examples(weight, tmp_path):
    (tmp_path / "x.csv").write_text(f"text,label,w\na,0,1\nb,1,{weight}\n")
    with pytest.raises(ConfigError, match=r"line 3: the weight 'w' is .*, not a number of at least 0"):
        open_dataset(f"csv_rows:{tmp_path}/x.csv", {"sequence_length": 4, "tokenizer": "byte", "weight_column": "w", "holdout": 0.0}, None)


def test_images_of_weights(tmp_path):
    from PIL import Image

    for i in range(2):
        Image.new("L", (4, 4), 100 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "train.jsonl").write_text("".join(f'{{"image": "{i}.png", "label": "{i}", "w": {i + 0.5}}}\n' for i in range(2)))
    data = {"source": f"jsonl:{tmp_path}", "image_column": "image", "weight_column": "w", "size": 4, "holdout": 0.0, "batch_size": 2}
    experiment = build_experiment(small_configs.config(small_configs.CNN, data=data))
    assert [float(experiment.dataset.splits["train"][i]["weight"]) for i in range(2)] == [0.5, 1.5]
