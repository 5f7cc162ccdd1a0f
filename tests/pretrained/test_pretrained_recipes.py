"""Fine-tuning pretrained weights: losses equal PyTorch's, and every recipe trains from a folder with random weights.

pytest tests/pretrained/test_pretrained_recipes.py -m slow     # the recipes that the default suite leaves out
"""

import importlib.util
import json
import re

import jax
import numpy as np
import pretrained_folders
import pytest
from conftest import ROOT
from tokenizer_folders import LINES

import jaxmodels
from jaxmodels.config import load_config
from jaxmodels.experiment.build import build_experiment


def load_module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUICK = ("llama_hf_sft_lora",)
WORDS = " ".join(LINES).split()


def write_data(folder, name: str) -> dict:
    """Write small data of a recipe's kind; return the changes of the config."""
    draw = np.random.default_rng(0)

    def text(count):
        return " ".join(draw.choice(WORDS, count)).replace('"', "")

    if name == "bert_hf_sst2":
        (folder / "sst2").mkdir()
        for split in ("train", "dev", "test"):
            (folder / "sst2" / f"{split}.tsv").write_text("".join(f"{text(6)}\t{i % 2}\n" for i in range(16)))
        return {"data.batch_size": 4}
    if name == "bert_hf_glue":
        glue(folder, "sst2", ["sentence"], text)
        return {"data.batch_size": 4, "data.sequence_length": 32}
    if name == "bert_hf_ner":
        (folder / "wikiann_en").mkdir()
        for split in ("train", "dev", "test"):
            sentences = ["".join(f"{word}\t{tag}\n" for word, tag in zip(text(4).split(), ("O", "B-X", "I-X", "O"), strict=True)) for _ in range(16)]
            (folder / "wikiann_en" / f"{split}.conll").write_text("\n".join(sentences))
        return {"data.batch_size": 4}
    if name == "gpt2_hf_text":
        (folder / "tinyshakespeare").mkdir()
        (folder / "tinyshakespeare" / "input.txt").write_text(text(2000))
        return {"data.batch_size": 2, "data.sequence_length": 32}
    if name == "llama_hf_sft_lora":
        rows = [{"messages": [{"role": "user", "content": text(5)}, {"role": "assistant", "content": text(4)}]} for _ in range(40)]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"data.batch_size": 2, "data.sequence_length": 64, "training.precision": "float32"}
    if name == "t5_hf_seq2seq":
        return {"data.batch_size": 4, "data.examples": 40, "data.held_out": 8}
    return {"data.batch_size": 4, "training.accumulate": 2, "training.precision": "float32", "data.eval_batch_size": 4}


def glue(folder, task, columns, text):
    """Save a task of GLUE with few rows, as its authors publish it: the labels of tests are -1."""
    datasets = pytest.importorskip("datasets")
    kind = datasets.Value("float32") if task == "stsb" else datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"label": kind, "idx": datasets.Value("int32")})
    splits = ("train", "validation_matched", "validation_mismatched", "test_matched") if task == "mnli" else ("train", "validation", "test")
    parts = {}
    for size, split in zip((16, 8, 6, 4), splits, strict=False):
        labels = [-1 if split.startswith("test") else i % 2 for i in range(size)]
        rows = {name: [text(5) for _ in range(size)] for name in columns} | {"label": labels, "idx": list(range(size))}
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(folder / "glue" / task))


def test_each_task_of_glue_is_one_command(tmp_path, published):
    """Its columns, its kind of label and its splits."""
    changes = {"data.batch_size": 4, "data.sequence_length": 32, "optimizer.schedule.warmup": 1}
    tasks = load_module(ROOT / "configs" / "bert_hf_glue.py").TASKS
    model = published("bert_hf_glue")
    for task, (one, two, metric) in tasks.items():
        glue(tmp_path, task, [one] + ([two] if two else []), lambda count: " ".join(WORDS[:count]))
        experiment = build_experiment(load_config(f"{ROOT / 'configs' / 'bert_hf_glue.py'}:{model},{task}", changes), data_dir=str(tmp_path))
        sizes = {split: len(part) for split, part in experiment.dataset.splits.items()}
        assert sizes == {"train": 16} | ({"validation/matched": 8, "validation/mismatched": 6} if task == "mnli" else {"validation": 8}), task
        assert ("types" in experiment.dataset.splits["train"][0]) == (two is not None)
        assert metric in (*experiment.task.shown, *experiment.task.scores)


def images():
    draw = np.random.default_rng(0)
    return {
        split: {"image": draw.integers(0, 256, (8, 32, 32, 3), np.uint8), "label": np.arange(8, dtype=np.int32)} for split in ("train", "validation", "test")
    }


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in pretrained_folders.RECIPES])
def test_a_recipe_trains_evaluates_and_is_loaded(name, tmp_path):
    folder = pretrained_folders.RECIPES[name](tmp_path / "model")
    changes = write_data(tmp_path, name) | {
        "optimizer.schedule.warmup": 1,
        "training.epochs": None,
        "training.steps": 2,
        "log.every": 1,
        "log.tensorboard": False,
    }
    config = load_config(f"{ROOT / 'configs' / name}.py:{folder}", changes)
    given = {}
    if name == "vit_hf_cifar10":
        config.data = {"source": "arrays", "batch_size": 4, "eval_batch_size": 4}
        given = {"data": images()}
    config.evaluation.every = config.checkpoint.every = 2
    run = str(tmp_path / "run")
    jaxmodels.train(config, run, data_dir=str(tmp_path), quiet=True, **given)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all() and any(line["split"] == "validation" for line in lines)
    parent = json.loads((tmp_path / "run" / "manifest.json").read_text())["parents"][0]
    assert parent["run"] == f"hf:{folder}" and len(parent["taken"]) > 10
    # Parameters without pretrained weights are initialised: the new head of a fine-tuned encoder, the adapters.
    fresh = {
        "bert_hf_sst2": "head/output",
        "bert_hf_glue": "head/output",
        "bert_hf_ner": "head/output",
        "llama_hf_sft_lora": "lora_",
        "vit_hf_cifar10": "output/",
    }.get(name)
    assert all(fresh and fresh in path for path in parent["initialised"]) and bool(parent["initialised"]) == bool(fresh)
    loaded = jaxmodels.load(run)
    if loaded.tokenizer is not None:
        assert loaded.tokenizer.files()["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    trained = [path for path, _ in jax.tree_util.tree_leaves_with_path(build_experiment(config, data_dir=str(tmp_path), **given).state_shapes().params)]
    if name == "llama_hf_sft_lora":
        assert all(re.search("lora_[ab]", str(path)) for path in trained)


def padded_rows(rows: int, length: int) -> dict[str, np.ndarray]:
    """Return tokens between [CLS] and [SEP], of different lengths, padded with -1, and labels."""
    draw = np.random.default_rng(1)
    tokens = np.full((rows, length), -1, np.int32)
    for row, size in zip(tokens, draw.integers(3, length + 1, rows), strict=True):
        row[:size] = [2, *draw.integers(5, 200, size - 2), 3]
    tokens[0, 1] = 199  # the vocabulary is as large as its largest token
    return {"tokens": tokens, "label": draw.integers(0, 2, rows).astype(np.int32)}


def test_ten_steps_from_imported_bert_are_those_of_pytorch(tmp_path):
    import torch
    import transformers

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    folder, data = pretrained_folders.bert(tmp_path / "bert", with_head=True, initializer_range=0.2, **none), padded_rows(40, 24)
    config = load_config(f"{ROOT}/configs/bert_hf_sst2.py:{folder}").to_dict()
    config |= {"data": {"source": "arrays", "batch_size": 4, "shuffle": False}, "training": {"steps": 10}, "model": {"dropout": 0.0, "scan": True}}
    config["optimizer"] |= {"learning_rate": 1e-3, "clip_norm": None, "schedule": {"name": "linear", "warmup": 3}}
    config |= {"evaluation": {}, "checkpoint": {}, "log": {"every": 1, "tensorboard": False}}
    jaxmodels.train(config, str(tmp_path / "run"), data={"train": data}, quiet=True)
    ours = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    model = transformers.BertForSequenceClassification.from_pretrained(folder).train()
    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n]
    others = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 3 if step < 3 else 1 - (step - 3) / 7)
    tokens, labels, theirs = torch.tensor(data["tokens"]).long(), torch.tensor(data["label"]).long(), []
    for rows in np.split(np.arange(40), 10):
        loss = model(tokens[rows].clamp(min=0), attention_mask=(tokens[rows] >= 0).long(), labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert max(theirs) - min(theirs) > 0.05, "the losses differ from step to step"


def test_images_are_those_of_the_pretrained_preprocessor():
    """`task.resize`, `task.mean` and `task.std` give the image of `transformers`, to a step of its rounding to bytes."""
    import jax
    import transformers

    from jaxmodels.tasks.classify import Classify

    task = Classify({"image_shape": (32, 32, 3), "num_classes": 10}, resize=(224, 224), mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.1))
    assert task.provides["image_shape"] == (224, 224, 3) and task.batch["image"] == (32, 32, 3)
    image = images()["train"]["image"]
    seen = []
    model = lambda image, rngs=None: (seen.append(np.asarray(image)), jax.numpy.zeros((len(image), 10)))[1]  # noqa: E731
    task.predict(model, {"image": jax.numpy.asarray(image)})
    theirs = transformers.ViTImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.2, 0.1])(
        list(image), return_tensors="np", input_data_format="channels_last"
    )
    np.testing.assert_allclose(seen[0], theirs["pixel_values"].transpose(0, 2, 3, 1), atol=1.01 / 255 / 0.1)
    with pytest.raises(jaxmodels.ConfigError, match="config.task.resize is the height and width"):
        Classify({"image_shape": (32, 32, 3), "num_classes": 10}, resize=(224,))
