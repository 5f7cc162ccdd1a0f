"""Rows of text, tags and images from files: values, errors with file and line, and skipped rows."""

import json
import pickle
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from jaxmodels import api
from jaxmodels.data import fitted, loader
from jaxmodels.data.features.array import Array
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.rows import Holdout, open_on_read
from jaxmodels.data.skipping import BadExample, Forgiving
from jaxmodels.data.source import Arrays, CachedSource, get_batch
from jaxmodels.data.sources import tfds
from jaxmodels.errors import ConfigError
from jaxmodels.inference import evaluate
from jaxmodels.models import create
from jaxmodels.tasks.classify import Classify

TEXT = {"sequence_length": 8, "tokenizer": "word:100"}
GOOD = "good film\t1\nbad film\t0\nfine\t1\nawful\t0\n"
TAGGED = "Ann\tB-PER\nLee\tI-PER\nsleeps\tO\n\nParis\tB-LOC\n\n"


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def words(dataset, split, key="tokens"):
    """Return the texts of a split, decoded by its tokenizer."""
    return [dataset.info["tokenizer"].decode(row[key]) for row in dataset.splits[split]]


def test_the_same_rows_from_every_format(tmp_path):
    """The values that were written are read, the same from every format."""
    rows = [("good film", "yes"), ("bad, bad film", "no"), ("fine", "yes"), ("awful", "no")]
    write(
        tmp_path,
        train__tsv="".join(f"{text}\t{label}\n" for text, label in rows),
        dev__tsv="film\tno\r\n",
        train__csv="id,label,text\n" + "".join(f'{i},{label},"{text}"\n' for i, (text, label) in enumerate(rows)),
        validation__csv="id,label,text\n7,no,film\n",
    )
    (tmp_path / "part").mkdir()
    for i, part in enumerate((rows[:1], rows[1:])):
        (tmp_path / "part" / f"train-{i}.jsonl").write_text("".join(json.dumps({"label": label, "text": text}) + "\n" for text, label in part))
    (tmp_path / "part" / "valid.jsonl").write_text('{"text": "film", "label": "no", "more": 1}\n')
    opened = [
        open_dataset(source, TEXT, str(tmp_path.parent))
        for source in (f"tsv:{tmp_path}", f"tsv:{tmp_path}/{{split}}.tsv", f"csv_rows:{tmp_path.name}", f"jsonl:{tmp_path}/part")
    ]
    for dataset in opened:
        assert words(dataset, "train") == [text for text, _ in rows] and words(dataset, "validation") == ["film"]
        assert [dataset.info["labels"][row["label"]] for row in dataset.splits["train"]] == [label for _, label in rows]
        assert dataset.info["num_classes"] == 2 and dataset.skipped == {} and dataset.notes == ()
        assert dataset.splits["train"].fingerprint() == opened[0].splits["train"].fingerprint()


def test_padding_truncation_and_values(tmp_path):
    write(tmp_path, train__tsv="a b c d\t0.5\nb\t-2\n", test__tsv="d d\t1e1\n")
    dataset = open_dataset(f"tsv:{tmp_path}", {"sequence_length": 3, "tokenizer": "word:9", "label": "value", "holdout": 0.0}, None)
    rows = dataset.splits["train"].arrays
    assert rows["tokens"].dtype == np.int32 and (rows["tokens"][0] >= 0).all() and (rows["tokens"][1, 1:] == -1).all()
    assert words(dataset, "train") == ["a b c", "b"] and set(dataset.splits) == {"train", "test"}
    np.testing.assert_array_equal(rows["label"], np.array([0.5, -2], np.float32))
    assert "num_classes" not in dataset.info and "1 of 2" in dataset.notes[0]
    alone = open_dataset(f"tsv:{tmp_path}", TEXT | {"label": "none"}, None)
    assert set(alone.splits["train"][0]) == {"tokens"}


def test_pairs_of_texts(tmp_path):
    write(tmp_path, train__csv="en,de\na b,x y z\nc,z\n")
    options = {"sequence_length": 4, "target_length": 3, "tokenizer": "word:20", "source_column": "en", "target_column": "de", "holdout": 0.0}
    dataset = open_dataset(f"csv_rows:{tmp_path}/train.csv", options, None)
    coder, rows = dataset.info["tokenizer"], dataset.splits["train"].arrays
    assert rows["source"].shape == (2, 4) and rows["target"].shape == (2, 4)
    assert words(dataset, "train", "source") == ["a b", "c"] and words(dataset, "train", "target") == ["<start> x y <end>", "<start> z <end>"]
    assert rows["target"][1, 3] == -1 and rows["target"][0, 0] == coder.special("start") and rows["target"][0, 3] == coder.special("end")
    with pytest.raises(ConfigError, match=r"byte\+special"):
        open_dataset(f"csv_rows:{tmp_path}/train.csv", options | {"tokenizer": "byte"}, None)


def test_held_out_rows_are_drawn_once(tmp_path):
    """From a file sorted by label: train and validation together have all rows, each has both labels, and the split is deterministic."""
    write(tmp_path, all__tsv="".join(f"w{i}\t{i // 50}\n" for i in range(100)))
    options = {"sequence_length": 1, "tokenizer": "word:200", "holdout": 0.2}
    one, two = (open_dataset(f"tsv:{tmp_path}/all.tsv", options | {"tokenizer": "character", "sequence_length": 4}, None) for _ in range(2))
    train, validation = words(one, "train"), words(one, "validation")
    assert len(train) == 80 and sorted(train + validation) == sorted(f"w{i}" for i in range(100))
    assert set(one.splits["validation"].arrays["label"]) == {0, 1} and validation == words(two, "validation")


def test_tags_are_on_first_pieces(tmp_path):
    write(tmp_path, train__conll=TAGGED, test__conll="-DOCSTART-\n\nLee B-PER\n\n\nAnn O")
    options = {"sequence_length": 12, "tokenizer": "byte", "holdout": 0.0}
    dataset = open_dataset(f"conll:{tmp_path}", options, None)
    tags, row = dataset.info["tags"], dataset.splits["train"][0]
    assert tags == ["B-LOC", "B-PER", "I-PER", "O"] and dataset.info["num_tags"] == 4
    at = {int(i): tags[row["tags"][i]] for i in np.flatnonzero(row["tags"] >= 0)}
    # "Ann Lee sleeps" in bytes, cut at 12: the tag is on the first letter, not on the space before it.
    assert bytes(row["tokens"].astype(np.uint8)) == b"Ann Lee slee" and at == {0: "B-PER", 4: "I-PER", 8: "O"}
    assert "1 of 2 examples of train" in dataset.notes[0]
    assert words(dataset, "test") == ["Lee", "Ann"]
    whole = open_dataset(f"conll:{tmp_path}", options | {"tokenizer": "word:9"}, None).splits["train"][0]
    assert [tags[t] for t in whole["tags"] if t >= 0] == ["B-PER", "I-PER", "O"] and ((whole["tags"] >= 0) == (whole["tokens"] >= 0)).all()


# Errors: source, options, files, and a pattern of the message.
BAD = {
    "test label not in train": ("tsv", {}, {"train": GOOD, "test": "ok film\t0\nwhat\t7\n"}, r"test\.tsv, line 2: the label '7' is none of 0, 1"),
    "misspelt label": ("tsv", {"labels": ("pos", "neg")}, {"train": "a\tpos\nb\tneg\nc\tneq\n"}, r"train\.tsv, line 3.*Did you mean 'neg'"),
    "label out of the given": ("tsv", {"labels": ("0", "1")}, {"train": GOOD + "x\t2\n"}, r"line 5: the label '2' is none of 0, 1"),
    "too few columns": ("tsv", {}, {"train": GOOD + "only a text\n"}, r"train\.tsv, line 5: the row has 1 columns"),
    "too many columns": ("tsv", {}, {"train": "good\t1\tx\n" + GOOD}, r"line 2: the row has 2 columns, the first of the file 3"),
    "after blank lines": ("tsv", {}, {"train": "good\t1\n\n \nbad\n\n"}, r"line 4: the row has 1 columns"),
    "empty text": ("tsv", {}, {"train": GOOD + "  \t1\n"}, r"line 5: the text of column 0 is empty"),
    "empty label": ("tsv", {}, {"train": GOOD + "text\t\n"}, r"line 5: the label 1 is ''"),
    "not UTF-8": ("tsv", {}, {"train": GOOD.encode() + b"caf\xe9\t1\n"}, r"line 5: the text of column 0 is not UTF-8"),
    "not a number": ("tsv", {"label": "value"}, {"train": "a\t1.5\nb\tmuch\n"}, r"line 2: the label 1 is 'much', not a finite number"),
    "not finite": ("tsv", {"label": "value"}, {"train": "a\t1.5\nb\tnan\n"}, r"line 2: the label 1 is 'nan'"),
    "too long": ("tsv", {"truncate": False, "sequence_length": 1}, {"train": "a\t0\na b\t1\n"}, r"line 2: 2 tokens, where 1 fit"),
    "unclosed quote": ("csv_rows", {}, {"train": 'text,label\na,0\n"b,1\n'}, r"train\.csv, line 3: not a row"),
    "no JSON": ("jsonl", {}, {"train": '{"text": "a", "label": 0}\n{"text": \n'}, r"train\.jsonl, line 2: not JSON"),
    "no JSON object": ("jsonl", {}, {"train": '["a", 0]\n'}, r"line 1: not a JSON object"),
    "JSON without the key": ("jsonl", {}, {"train": '{"txt": "a", "label": 0}\n'}, r"line 1: no 'text' \(data.text_column\). Did you mean 'txt'"),
    "JSON text that is none": ("jsonl", {}, {"train": '{"text": 5, "label": 0}\n'}, r"line 1: 'text' is 5, not a text"),
    "JSON label that is none": ("jsonl", {}, {"train": '{"text": "a", "label": [1]}\n'}, r"line 1: the label 'label' is \[1\]"),
    "no tag": ("conll", {}, {"train": TAGGED + "Rome\n"}, r"train\.conll, line 7: 1 of the 2 columns"),
    "empty tag": ("conll", {}, {"train": TAGGED + "Rome\t\n"}, r"line 7: the tag is empty"),
    "inside nothing": ("conll", {}, {"train": TAGGED + "Rome\tI-LOC\n"}, r"line 7: the tag 'I-LOC' follows 'O': an entity begins with 'B-LOC'"),
    "inside another": ("conll", {}, {"train": TAGGED + "Ann\tB-PER\nRome\tI-LOC\n"}, r"line 8: the tag 'I-LOC' follows 'B-PER'"),
    "empty file": ("jsonl", {}, {"train": '{"text": "a", "label": 0}\n', "test": ""}, r"the files of test hold no example"),
    "no such scheme": ("conll", {}, {"train": TAGGED + "Ann\tPER\n"}, r"line 7: the tag 'PER' is none of O, B-NAME"),
    "tag not in train": ("conll", {}, {"train": TAGGED, "test": "a\tO\n\nb\tB-ORG\n"}, r"test\.conll, line 3: the tag 'B-ORG' is not in train"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_or_left_out(name, tmp_path):
    """Both policies: the error names file and line; or only that example is skipped, and counted."""
    source, options, files, message = BAD[name]
    extension = {"csv_rows": "csv"}.get(source, source)
    for split, content in files.items():
        write(tmp_path, **{f"{split}__{extension}": content})
    options = TEXT | {"holdout": 0.0} | options
    with pytest.raises(ConfigError, match=message):
        open_dataset(f"{source}:{tmp_path}", options, None)
    split = list(files)[-1]
    if "hold no example" in message:
        return
    if message.startswith("line 1:"):  # nothing would be left
        with pytest.raises(ConfigError, match=f"all 1 examples of {split} are bad; the first: .*{message}"):
            open_dataset(f"{source}:{tmp_path}", options | {"on_bad_example": "skip"}, None)
        return
    dataset = open_dataset(f"{source}:{tmp_path}", options | {"on_bad_example": "skip"}, None)
    assert dataset.skipped[split] == sum(dataset.skipped.values()) > 0
    assert dataset.notes[0].startswith(f"warning: {dataset.skipped[split]} bad example")
    content = files[split] if isinstance(files[split], str) else files[split].decode("latin-1")
    rows = [s for s in content.split("\n\n" if source == "conll" else "\n")[source == "csv_rows" :] if s and s != " "]
    assert len(dataset.splits[split]) == len(rows) - dataset.skipped[split]


# Errors under both policies: the config is wrong, not an example.
WRONG = {
    "no file": ("tsv", "nowhere", {}, r"no file or folder nowhere"),
    "no train": ("tsv", "empty", {}, r"has no train\.tsv, but trian\.tsv.*Did you mean 'trian\.tsv'"),
    "two names": ("tsv", "two", {}, r"dev\.tsv.*config\.data\.validation="),
    "column of that name": ("csv_rows", "csv", {"text_column": "txet"}, r"config\.data\.text_column: .*Did you mean 'text'"),
    "column of that number": ("tsv", "two", {"validation": "dev.tsv", "label_column": 2}, r"config\.data\.label_column=2: .* has 2 columns"),
    "name without header": ("tsv", "two", {"validation": "dev.tsv", "text_column": "text", "header": False}, r"data\.header=true"),
    "header denied": ("tsv", "header", {"header": False}, r"line 1: the label is 'label', all others are numbers: set data\.header=true"),
    "half a pair": ("tsv", "two", {"source_column": 0}, "go together"),
    "labels of values": ("tsv", "two", {"label": "value", "labels": ("a",)}, "config.data.labels"),
    "given file": ("tsv", "two", {"validation": "nothing*.tsv"}, r"config\.data\.validation: there is no file"),
    "holdout": ("tsv", "two", {"holdout": 1.0}, "config.data.holdout"),
    "no tokens at all": ("tsv", "two", {"sequence_length": 0}, "sequence_length"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configs_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, files in {
        "empty": {"trian__tsv": GOOD},
        "two": {"train__tsv": GOOD, "dev__tsv": GOOD, "val__tsv": GOOD},
        "csv": {"train__csv": "text,label\na,0\n"},
        "header": {"train__tsv": "sentence\tlabel\n" + GOOD},
    }.items():
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, **files)
    source, path, options, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        open_dataset(f"{source}:{path}", TEXT | {"on_bad_example": "skip"} | options, None)


def test_real_rows(data_dir):
    sst2 = open_dataset("tsv:sst2", {"sequence_length": 64, "tokenizer": "word:20000"}, data_dir)
    assert {k: len(v) for k, v in sst2.splits.items()} == {"train": 6920, "validation": 872, "test": 1821}
    assert np.bincount(sst2.splits["train"].arrays["label"]).tolist() == [3310, 3610] and sst2.info["labels"] == ["0", "1"]


TINY = {
    "model": {"name": "lstm", "layers": 1, "width": 8},
    "task": {"name": "language_model", "sample_length": 0},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
    "training": {"steps": 2},
    "log": {"every": 1, "tensorboard": False},
}


def test_left_out_rows_reach_the_metrics(tmp_path, capsys):
    """They are counted in every line of their split, in the manifest, and in a later evaluation; the message is printed once."""
    write(tmp_path, train__tsv="a b c\na b\n\t\nb c\n\t\n", dev__tsv="a b\n", test__tsv="b a\nb\t\n")
    data = {"source": f"tsv:{tmp_path}", "label": "none", "batch_size": 2, "on_bad_example": "skip"} | TEXT
    api.train(TINY | {"data": data}, str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"]: line.get("skipped_examples") for line in lines} == {"train": 2, "validation": None, "test": 1}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["skipped_examples"] == {"train": 2, "test": 1}
    assert evaluate.evaluate(str(tmp_path / "run"))["skipped_examples"] == 1
    printed = capsys.readouterr().out
    assert printed.count("2 bad examples of train left out") == 1 and "train.tsv, line 3" in printed.replace("\n", "")


def image_folder(path, splits=("train",), classes=("cat", "dog"), count=6):
    """Images of one grey value each, which identifies the file; the third dog's is broken."""
    for split in splits:
        for c, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (12, 8), 100 * c + 10 * i).save(path / split / name / f"{i}.png")
    return path


def spoil(path):
    path.write_bytes(path.read_bytes()[:40])


def test_image_folders(tmp_path):
    folder = image_folder(tmp_path / "a", ("train", "val"))
    (folder / "train" / "cat" / ".hidden").write_text("no image")
    dataset = open_dataset("images:a", {"size": (4, 6), "channels": 1}, str(tmp_path))
    assert dataset.info == {"image_shape": (4, 6, 1), "num_classes": 2, "labels": ["cat", "dog"]}
    rows = get_batch(dataset.splits["train"], np.arange(12))
    assert rows["image"].dtype == np.uint8 and rows["label"].tolist() == [0] * 6 + [1] * 6
    np.testing.assert_array_equal(rows["image"][:, 2, 3, 0], [100 * c + 10 * i for c in range(2) for i in range(6)])
    held = open_dataset(f"images:{folder}/train", {"size": 3, "holdout": 0.25}, None).splits
    greys = {name: sorted(int(row["image"][0, 0, 0]) for row in part) for name, part in held.items()}
    assert len(greys["validation"]) == 3 and sorted(greys["train"] + greys["validation"]) == rows["image"][:, 0, 0, 0].tolist()
    assert held["train"][0]["image"].shape == (3, 3, 3)
    before = dataset.splits["train"].fingerprint()
    listed = "".join(f"\n{i}.png {(folder / 'train' / name / f'{i}.png').stat().st_size} {c}" for c, name in enumerate(("cat", "dog")) for i in range(6))
    assert before == zlib.crc32(listed[1:].encode())
    spoil(folder / "train" / "dog" / "2.png")
    (folder / "train" / "dog" / "2.png").rename(folder / "train" / "dog" / "9.png")
    changed = open_dataset("images:a", {"size": (4, 6), "channels": 1}, str(tmp_path))
    assert any("train/dog has changed" in note for note in changed.notes)
    assert changed.splits["train"].fingerprint() != before
    assert changed.splits["train"].rows[11].where == f"{folder}/train/dog/9.png"
    (folder / "val" / "cow").mkdir()
    (folder / "val" / "cow" / "1.png").write_text("")
    with pytest.raises(ConfigError, match="class 'cow' is in validation, but not in train"):
        open_dataset(f"images:{folder}", {"size": 4}, None)
    with pytest.raises(ConfigError, match="there is no folder"):
        open_dataset("images:b", {"size": 4}, str(tmp_path))


def test_cropped_or_stretched(tmp_path):
    """For a wide image whose left and right thirds are white, the crop has only the black middle, and the stretch has all."""
    (tmp_path / "a").mkdir()
    pixels = np.full((10, 30), 255, np.uint8)
    pixels[:, 10:20] = 0
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    options = {"size": 10, "channels": 1, "holdout": 0.0}
    crop, stretch = (open_dataset(f"images:{tmp_path}", options | {"fit": fit}, None).splits["train"][0]["image"] for fit in ("crop", "stretch"))
    assert crop.max() < 30 and stretch[:, 0].min() > 225 and stretch[:, -1].min() > 225 and stretch[:, 5].max() < 30
    for wrong in ({"scale_to": 9}, {"scale_to": (10,)}, {"scale_to": (12, 12)}, {"scale_to": (12, 9), "fit": "stretch"}):
        with pytest.raises(ConfigError, match=r"config\.data\.scale_to"):
            open_dataset(f"images:{tmp_path}", options | wrong, None)


def test_a_broken_image_is_named_or_weighs_nothing(tmp_path):
    folder = image_folder(tmp_path)
    spoil(folder / "train" / "dog" / "2.png")
    options = {"size": 4, "holdout": 0.0}
    source = open_dataset(f"images:{folder}", options, None).splits["train"]
    assert int(source[7]["image"].max()) == 110
    with pytest.raises(ConfigError, match=r"train/dog/2\.png: cannot be decoded as an image"):
        source[8]
    with pytest.raises(BadExample) as caught:
        CachedSource(pickle.loads(pickle.dumps(source)))[8]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it is raised in a process that reads ahead
    batches = loader.TrainingBatches(source, 4, 9, seed=0, shuffle=True)
    with pytest.raises(ConfigError, match=r"dog/2\.png"):
        list(loader.read_ahead(batches, threads=2, workers=0, buffer=2))
    source = open_dataset(f"images:{folder}", options | {"on_bad_example": "skip"}, None).splits["train"]
    assert CachedSource(source).fingerprint() == source.fingerprint()
    for batch in (get_batch(CachedSource(source), np.arange(12)), loader.EvaluationBatches(source, 16)[0]):
        assert np.flatnonzero(batch["skipped"]).tolist() == [8] and not batch["image"][8].any()
    assert np.flatnonzero(batch["weight"]).tolist() == [i for i in range(12) if i != 8]
    batches = loader.TrainingBatches(source, 4, 9, seed=0, shuffle=True)
    for step in range(9):
        batch, bad = batches[step], batches.indices(4 * step, 4 * step + 4) == 8
        np.testing.assert_array_equal(batch["skipped"], bad)
        np.testing.assert_array_equal(batch["weight"], ~bad)


def test_examples_have_weights():
    source = Arrays({"image": np.zeros((3, 2)), "weight": np.array([0.5, 2, 1])})
    assert loader.EvaluationBatches(source, 4)[0]["weight"].tolist() == [0.5, 2, 1, 0]
    assert sorted(loader.TrainingBatches(source, 3, 1, seed=0, shuffle=True)[0]["weight"]) == [0.5, 1, 2]


CNN = TINY | {
    "model": {"name": "cnn", "features": (2,), "hidden": 2},
    "task": {"name": "classify"},
    "training": {"steps": 6},
    "evaluation": {"every": 3},
    "checkpoint": {"every": 2},
    "log": {"every": 3, "tensorboard": False},
}


def lines(run):
    timed = ("seconds", "steps_per_second", "examples_per_second", "data_wait")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_broken_images_count_exactly(tmp_path):
    """They are counted in every line, the metrics are those of the other images, and a resumed run writes the same lines."""
    folder = image_folder(tmp_path / "a", ("train", "val"), count=4)
    spoil(folder / "train" / "dog" / "2.png")
    spoil(folder / "val" / "cat" / "0.png")
    spoil(folder / "val" / "cat" / "3.png")
    data = {"source": f"images:{folder}", "size": 8, "batch_size": 4, "eval_batch_size": 16, "on_bad_example": "skip"}
    config = CNN | {"data": data}
    api.train(config, str(tmp_path / "run"))
    written = lines(tmp_path / "run")
    counts = {split: [line["skipped_examples"] for line in written if line["split"] == split] for split in ("train", "validation")}
    assert counts["validation"] == [2, 2]
    # 24 rows are three epochs of eight, each with the broken image once.
    assert sum(counts["train"]) == 3
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")  # stopped at step 4, in the middle of a line
    api.train(config, str(tmp_path / "run"))
    assert lines(tmp_path / "run") == written
    (folder / "val" / "cat" / "0.png").unlink()
    (folder / "val" / "cat" / "3.png").unlink()
    clean = evaluate.evaluate(str(tmp_path / "run"), split="validation")
    assert clean["loss"] == pytest.approx(written[-1]["loss"], rel=1e-6) and clean["skipped_examples"] == 0


def test_a_row_of_weight_0_is_not_mixed_into_others():
    """Its content changes neither the loss nor the gradient."""
    task = Classify({"image_shape": (4, 4, 1), "num_classes": 2}, mixup=1.0)
    model = create("cnn", (4, 4, 1), 2, features=(2,), hidden=2, dropout=0.0, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).random((8, 4, 4, 1), np.float32)
    weight = np.ones(8, np.float32)
    weight[[2, 7]] = 0

    def loss(model, fill):
        batch = {"image": jnp.where(weight[:, None, None, None] > 0, image, fill), "label": np.arange(8) % 2, "weight": weight}
        return task.loss(model, jax.tree.map(jnp.asarray, batch), nnx.Rngs(dropout=1))[0]

    step = nnx.jit(nnx.value_and_grad(loss))
    (one, first), (two, second) = (step(model, np.float32(fill)) for fill in (0, 9))
    assert one == two and one > 0
    jax.tree.map(np.testing.assert_array_equal, first, second)


class Broken:
    """A TFDS source whose second image does not decode."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise OSError("Truncated File Read")
        return {"image": np.ones((2, 2, 1), np.uint8), "label": np.int64(1)}


def test_a_broken_tfds_example(data_dir):
    arrays = [Array(column="image", shape=(2, 2, 1), dtype=np.dtype(np.uint8)), Array(column="label", shape=(), dtype=np.dtype(np.int64))]
    source = open_on_read({"train": tfds.SplitRows(Broken(), "pictures train")}, arrays, Holdout(holdout=0.0)).splits["train"]
    with pytest.raises(ConfigError, match="pictures train, example 1: cannot be decoded: Truncated"):
        get_batch(source, np.arange(3))
    blank = {"image": np.zeros((2, 2, 1), np.uint8), "label": np.int32(0)}
    assert get_batch(Forgiving(source, blank), np.arange(3))["skipped"].tolist() == [0, 1, 0]
    real = open_dataset("tfds:cifar10", {"on_bad_example": "skip"}, data_dir).splits["test"]
    for name, value in real.blank.items():
        assert (value.shape, value.dtype) == (real[0][name].shape, real[0][name].dtype)


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return pytest.importorskip("datasets")


def test_texts_of_huggingface(tmp_path, datasets):
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    train = datasets.Dataset.from_dict({"sentence": ["good film", "bad film", "fine"], "label": [1, 0, 1]}, features)
    test = datasets.Dataset.from_dict({"sentence": ["film", "no label", " "], "label": [0, -1, 1]}, features)
    datasets.DatasetDict(train=train, dev=train, test=test).save_to_disk(tmp_path / "a")
    options = TEXT | {"text_column": "sentence"}
    with pytest.raises(ConfigError, match="a test, row 2: the text of column 'sentence' is empty"):
        open_dataset("hf:a", options, str(tmp_path))
    dataset = open_dataset("hf:a", options | {"on_bad_example": "skip"}, str(tmp_path))
    assert dataset.info["labels"] == ["neg", "pos"] and dataset.splits["train"].arrays["label"].tolist() == [1, 0, 1]
    assert words(dataset, "validation") == ["good film", "bad film", "fine"] and words(dataset, "test") == ["film"]
    assert dataset.skipped == {"test": 2}
    with pytest.raises(ConfigError, match=r"text_column: .*no column 'sentense'. Did you mean 'sentence'"):
        open_dataset("hf:a", TEXT | {"text_column": "sentense"}, str(tmp_path))
    with pytest.raises(ConfigError, match="image_column and size"):
        open_dataset("hf:a", {}, str(tmp_path))
    with pytest.raises(ConfigError, match="save_to_disk"):
        open_dataset("hf:hf", TEXT, str(image_folder(tmp_path / "hf").parent))


def test_images_of_huggingface(tmp_path, datasets):
    import io

    def png(grey):
        file = io.BytesIO()
        Image.new("L", (6, 4), grey).save(file, "PNG")
        return file.getvalue()

    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    pictures = [{"bytes": png(10 * i), "path": None} for i in range(6)]
    pictures[4]["bytes"] = pictures[4]["bytes"][:40]
    rows = datasets.Dataset.from_dict({"picture": pictures, "kind": ["b", "a"] * 3}, features)
    rows.save_to_disk(tmp_path / "a")
    options = {"image_column": "picture", "label_column": "kind", "size": 2, "channels": 1, "holdout": 0.34}
    dataset = open_dataset(f"hf:{tmp_path}/a", options | {"on_bad_example": "skip"}, None)
    assert dataset.info == {"image_shape": (2, 2, 1), "num_classes": 2, "labels": ["a", "b"]}
    parts = [get_batch(source, np.arange(len(source))) for source in dataset.splits.values()]
    assert [len(part["label"]) for part in parts] == [4, 2]
    seen = {(int(g[0, 0, 0]), int(k), int(s)) for part in parts for g, k, s in zip(part["image"], part["label"], part["skipped"], strict=True)}
    assert seen == {(10 * i, (i + 1) % 2, 0) for i in (0, 1, 2, 3, 5)} | {(0, 0, 1)}
    datasets.DatasetDict(train=rows, test=rows.select([0, 1]).map(lambda row: {"kind": row["kind"].replace("a", "c")})).save_to_disk(tmp_path / "b")
    with pytest.raises(ConfigError, match="b test, row 1: the label 'c' is none of a, b"):
        open_dataset(f"hf:{tmp_path}/b", options, None)
    other = open_dataset(f"hf:{tmp_path}/b", options | {"on_bad_example": "skip"}, None).splits["test"]
    assert get_batch(other, np.arange(2))["skipped"].tolist() == [0, 1]
    strict = open_dataset(f"hf:{tmp_path}/a", options | {"holdout": 0.0}, None).splits["train"]
    with pytest.raises(ConfigError, match="a train, row 4: cannot be decoded as an image"):
        get_batch(strict, np.arange(6))


IMAGES = {"image": np.zeros((3, 2, 2, 1)), "label": np.array([0, 2, 1])}
TAGS = {"tokens": np.array([[4, 1, -1]]), "tags": np.array([[1, 0, -1]])}


def test_info_of_arrays():
    assert open_dataset("arrays", {}, None, {"train": IMAGES, "test": IMAGES}).info == {"image_shape": (2, 2, 1), "num_classes": 3}
    assert open_dataset("arrays", {}, None, {"train": TAGS}).info == {"num_tags": 2, "tags": ["0", "1"], "vocab_size": 5}
    pairs = {"source": np.array([[7, -1]]), "target": np.array([[1, 9]])}
    assert open_dataset("arrays", {}, None, {"train": pairs}).info == {"vocab_size": 10}
    assert open_dataset("arrays", {}, None, {"train": {"tokens": TAGS["tokens"], "label": np.array([-0.5])}}).info == {"vocab_size": 5}


def test_a_split_with_fewer_tags_agrees_with_the_run():
    trained = open_dataset("arrays", {}, None, {"train": TAGS}).info
    fewer = open_dataset("arrays", {}, None, {"test": TAGS | {"tags": np.array([[0, 0, -1]])}}).info
    assert fewer["tags"] == ["0"] and fitted.agreed_info(fewer, trained) == trained
    with pytest.raises(ConfigError, match="num_tags: 1 when the run was trained, 2 now"):
        fitted.agreed_info(trained, fewer)
    with pytest.raises(ConfigError, match="labels"):
        fitted.agreed_info({"labels": ["b", "a"]}, {"labels": ["a", "b"]})


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (IMAGES, IMAGES | {"label": np.array([0, 1, 3])}, "'label' of test, row 2: 3 is more than any of train, 2"),
        (IMAGES, IMAGES | {"label": np.array([0, -1, 1])}, "'label' of test must be whole numbers from 0 on"),
        (IMAGES, IMAGES | {"label": np.array([0, 0.5, 1])}, "'label' of test must be whole numbers"),
        (TAGS, TAGS | {"tags": np.array([[2, 0, -1]])}, "'tags' of test, row 0: 2 is more than any of train, 1"),
        (TAGS, TAGS | {"tags": np.array([[1, 0]])}, r"one for each of its tokens; they are \(1, 2\), the tokens \(1, 3\)"),
        ({"tags": TAGS["tags"]}, TAGS, "tags of train must be one for each"),
    ],
)
def test_bad_arrays_are_named(train, test, message):
    with pytest.raises(ConfigError, match=message):
        open_dataset("arrays", {}, None, {"train": train, "test": test})


def test_bad_tables_are_named(tmp_path, csv_reader):
    write(tmp_path, a__csv="date,x,y\nd,1,2\nd,1,2,3\n", b__csv="date,x,y\nd,1,2\nd,1,two\n")
    options = {"lookback": 1, "horizon": 1, "rows": (1, 1, 1)}
    for name, more, message in (
        ("a", {}, r"a\.csv, line 3: 4 columns, where the header has 3"),
        ("b", {}, r"b\.csv, line 3: 'y' is 'two', not a number"),
        ("b", {"columns": ("xx",)}, "no column 'xx'; it has date, x, y. Did you mean 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_dataset(f"csv:{tmp_path}/{name}.csv", options | more, None)
