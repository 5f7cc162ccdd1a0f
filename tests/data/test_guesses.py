"""What sources conclude from names and contents: it is right, or said, or asked for."""

import hashlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from jaxmodels.data import guesses
from jaxmodels.data.registry import open_dataset
from jaxmodels.errors import ConfigError

TEXT = {"sequence_length": 8, "tokenizer": "byte", "holdout": 0.0}


def write(folder, **files):
    """Write files; `__` in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pictures(folder, *names, count=2):
    for grey, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            rest = hashlib.md5(folder.name.encode()).digest()[1:]  # the images of two folders differ
            Image.frombytes("L", (4, 4), bytes([10 * grey + i]) + rest).save(folder / name / f"{i}.png")
    return folder


def texts(dataset, split="train"):
    tokenizer = dataset.info["tokenizer"]
    return [tokenizer.decode(row["tokens"][row["tokens"] >= 0]) for row in (dataset.splits[split][i] for i in range(len(dataset.splits[split])))]


def labels(dataset, split="train"):
    return [dataset.info["labels"][int(dataset.splits[split][i]["label"])] for i in range(len(dataset.splits[split]))]


# Splits


def test_splits_in_any_capitals_are_splits_and_said(tmp_path):
    for split in ("Train", "Val", "TEST"):
        pictures(tmp_path / "pets" / split, "cat", "dog")
    dataset = open_dataset(f"images:{tmp_path}/pets", {"size": 4, "channels": 1}, None)
    assert dataset.info["labels"] == ["cat", "dog"] and {name: len(part) for name, part in dataset.splits.items()} == dict.fromkeys(
        ("train", "validation", "test"), 4
    )
    assert dataset.guesses == (f"{tmp_path}/pets: Train is train; Val is validation; TEST is test (data.train, data.validation, data.test)",)
    write(tmp_path / "rows", Train__TSV="a\tx\nb\ty\n", Dev__tsv="c\tx\n", extra__tsv="d\tx\n")
    dataset = open_dataset(f"tsv:{tmp_path}/rows", TEXT, None)
    assert texts(dataset) == ["a", "b"] and texts(dataset, "validation") == ["c"]
    assert dataset.guesses == (f"{tmp_path}/rows: Train.TSV is train; Dev.tsv is validation; extra.tsv is not used (data.train, data.validation, data.test)",)
    write(tmp_path / "rows", train__tsv="a\tx\n")
    with pytest.raises(ConfigError, match=r"has .*Train\.TSV and .*train\.tsv; choose one with --config\.data\.train=FILE"):
        open_dataset(f"tsv:{tmp_path}/rows", TEXT, None)


def test_the_usual_names_are_no_guess(tmp_path):
    for split in ("train", "validation"):
        pictures(tmp_path / "pets" / split, "cat", "dog")
    assert open_dataset(f"images:{tmp_path}/pets", {"size": 4}, None).guesses == ()


def test_a_class_with_the_name_of_a_split(tmp_path):
    """Beside a bus and a plane, a folder `train` may be a class, or what trains."""
    folder = pictures(tmp_path, "train", "bus", "plane")
    pictures(folder / "train", "a", "b")
    with pytest.raises(
        ConfigError, match=r"has the folder 'train', which is the name of a split, beside 'bus', 'plane'\. If all are classes, set data\.train=\."
    ):
        open_dataset(f"images:{tmp_path}", {"size": 4}, None)
    every = open_dataset(f"images:{tmp_path}", {"size": 4, "train": "."}, None)
    assert every.info["labels"] == ["bus", "plane", "train"] and every.guesses == ()
    assert open_dataset(f"images:{tmp_path}", {"size": 4, "train": "train"}, None).info["labels"] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"config\.data\.test: .* has no folder 'tran'\. Did you mean 'train'"):
        open_dataset(f"images:{tmp_path}", {"size": 4, "test": "tran"}, None)


def test_classes_beside_a_folder_that_validates(tmp_path):
    folder = pictures(tmp_path, "bus", "plane")
    pictures(folder / "held", "bus", "plane", count=3)
    splits = open_dataset(f"images:{folder}", {"size": 4, "train": ".", "validation": "held"}, None).splits
    assert {name: len(part) for name, part in splits.items()} == {"train": 4, "validation": 6}


def test_other_folders_beside_splits_are_said(tmp_path):
    for split in ("train", "test"):
        pictures(tmp_path / split, "cat", "dog")
    pictures(tmp_path, "annotations")
    assert "annotations is not used" in open_dataset(f"images:{tmp_path}", {"size": 4}, None).guesses[0]


@pytest.fixture
def saved(tmp_path):
    """Function of (name, split -> (class names, labels)) that saves a data set of the Hugging Face library."""
    datasets = pytest.importorskip("datasets")

    def save(name, **splits):
        parts = {}
        for split, (names, numbers) in splits.items():
            features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
            rows = {"text": [f"{split} {i}" for i in range(len(numbers))], "label": numbers}
            parts[split] = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / name))
        return f"hf:{tmp_path / name}"

    return save


@pytest.mark.parametrize("indexed", [False, True])
def test_hidden_labels_and_splits_of_other_names(indexed, saved):
    """As the sets of GLUE are saved: the labels of tests are -1, and one of them has two validation splits."""
    both, options = ["no", "yes"], TEXT | {"indexed": indexed}
    dataset = open_dataset(saved("sst2", train=(both, [0, 1, 1]), validation=(both, [0, 1]), test=(both, [-1, -1])), options, None)
    assert sorted(dataset.splits) == ["train", "validation"]
    assert "test is left out: no row of it has a label in 'label'" in dataset.guesses
    source = saved("mnli", train=(both, [0, 1, 1]), validation_matched=(both, [0, 1]), validation_mismatched=(both, [1]), test_matched=(both, [-1]))
    dataset = open_dataset(source, options, None)
    assert sorted(dataset.splits) == ["train"] and "test_matched, validation_matched, validation_mismatched are not used" in dataset.guesses[0]
    dataset = open_dataset(source, options | {"validation": "validation_mismatched"}, None)
    assert len(dataset.splits["validation"]) == 1 and labels(dataset, "validation") == ["yes"]
    with pytest.raises(ConfigError, match=r"config\.data\.test: .* has no split 'test_match'\. Did you mean 'test_matched'"):
        open_dataset(source, options | {"test": "test_match"}, None)
    with pytest.raises(ConfigError, match="the label '-1' is none of no, yes"):  # one of several: a bad example
        dataset = open_dataset(saved("some", train=(both, [0, 1]), test=(both, [1, -1])), options, None)
        labels(dataset, "test")


@pytest.mark.parametrize("indexed", [False, True])
def test_hidden_numbers(indexed, tmp_path):
    """As the scores of STS-B's test: -1, where train has none."""
    write(tmp_path, train__tsv="a\t0.5\nb\t4\n", dev__tsv="c\t2\n", test__tsv="d\t-1\ne\t-1.0\n")
    options = TEXT | {"label": "value", "header": False, "indexed": indexed}
    assert sorted(open_dataset(f"tsv:{tmp_path}", options, None).splits) == ["train", "validation"]
    write(tmp_path, train__tsv="a\t-1\nb\t4\n")
    assert sorted(open_dataset(f"tsv:{tmp_path}", options, None).splits) == ["test", "train", "validation"]


@pytest.mark.parametrize("indexed", [False, True])
def test_numbers_of_classes_are_read_by_the_names_of_their_own_split(indexed, saved):
    source = saved("animals", train=(["cat", "dog", "fox"], [0, 1, 2]), test=(["dog", "fox"], [0, 1, 0]))
    assert labels(open_dataset(source, TEXT | {"indexed": indexed}, None), "test") == ["dog", "fox", "dog"]


# Files that are no examples


def test_litter_links_and_hidden_folders(tmp_path):
    folder = pictures(tmp_path / "pets", "cat", "dog")
    pictures(folder / "dog", ".thumbnails", "__MACOSX", "puppies")
    write(folder / "dog", Thumbs__db=b"\xd0\xcf\x11\xe0" * 100, desktop__ini="x")
    write(folder, readme__txt="about")
    pictures(tmp_path / "elsewhere", "wolf", count=3)
    (folder / "wolf").symlink_to(tmp_path / "elsewhere" / "wolf")
    (folder / "cat" / "again").symlink_to(folder / "cat")  # a circle
    dataset = open_dataset(f"images:{folder}", {"size": 4, "channels": 1, "holdout": 0.0}, None)
    assert labels(dataset) == ["cat"] * 2 + ["dog"] * 4 + ["wolf"] * 3
    assert sorted(int(dataset.splits["train"][i]["image"][0, 0, 0]) for i in range(9)) == [0, 0, 1, 1, 2, 10, 11, 20, 21]


@pytest.mark.parametrize(
    ("name", "content", "problem"), [("notes.txt", b"hello", "it is no image"), ("0.jpeg", b"", "the file is empty"), ("odd", b"\1" * 9, "it is no im")]
)
def test_a_file_that_is_no_image_is_found_at_the_start(name, content, problem, tmp_path):
    folder = pictures(tmp_path, "cat", "dog")
    (folder / "dog" / name).write_bytes(content)
    options = {"size": 4, "holdout": 0.0}
    for _ in range(2):  # also when the index is read from the cache
        with pytest.raises(ConfigError, match=rf"dog/{name}: {problem}"):
            open_dataset(f"images:{folder}", options, None)
    source = open_dataset(f"images:{folder}", options | {"on_bad_example": "skip"}, None).splits["train"]
    assert [int(source[i]["skipped"]) for i in range(len(source))].count(1) == 1
    Image.new("L", (4, 4), 7).save(folder / "dog" / name, format="PNG")  # an image without the extension of one
    assert len(open_dataset(f"images:{folder}", options, None).splits["train"]) == 5


# Headers, blank lines, encodings, quotes


def test_a_header_is_recognised_or_asked_for(tmp_path):
    mails = "".join(f"mail {i}\t{('ham', 'spam')[i % 2]}\n" for i in range(20))
    for indexed in (False, True):
        options = TEXT | {"indexed": indexed}
        write(tmp_path, mails__tsv=f"text\tlabel\n{mails}")
        dataset = open_dataset(f"tsv:{tmp_path}/mails.tsv", options, None)
        assert len(dataset.splits["train"]) == 20 and dataset.info["labels"] == ["ham", "spam"]
        assert f"the first line of {tmp_path}/mails.tsv names its columns" in dataset.guesses[0]
        assert len(open_dataset(f"tsv:{tmp_path}/mails.tsv", options | {"header": False}, None).splits["train"]) == 21
        write(tmp_path, mails__tsv=mails)
        dataset = open_dataset(f"tsv:{tmp_path}/mails.tsv", options, None)
        assert len(dataset.splits["train"]) == 20 and not [guess for guess in dataset.guesses if "first line" in guess]
        write(tmp_path, odd__tsv=f"Betreff\tArt\n{mails}")
        with pytest.raises(ConfigError, match=r"odd\.tsv, line 1: 'Art' is the label of no other line.*data\.header=true or data\.header=false"):
            open_dataset(f"tsv:{tmp_path}/odd.tsv", options, None)
        assert len(open_dataset(f"tsv:{tmp_path}/odd.tsv", options | {"header": True}, None).splits["train"]) == 20
        write(tmp_path / "two", train__tsv=f"text\tlabel\n{mails}", test__tsv=mails)
        with pytest.raises(ConfigError, match=r"the first line of .*train\.tsv seems to name columns, that of .*test\.tsv does not"):
            open_dataset(f"tsv:{tmp_path}/two", options, None)


def test_other_kinds_of_files_are_named_by_their_first_bytes(tmp_path):
    """A text may begin with the letters PK; a spreadsheet begins with two more bytes."""
    write(tmp_path, a__tsv="PK number\tx\nb\ty\n", b__tsv=b"PK\x03\x04" + b"\0" * 30)
    assert texts(open_dataset(f"tsv:{tmp_path}/a.tsv", TEXT | {"sequence_length": 20, "header": False}, None)) == ["PK number", "b"]
    with pytest.raises(ConfigError, match=r"b\.tsv is a ZIP archive or a spreadsheet by its first bytes"):
        open_dataset(f"tsv:{tmp_path}/b.tsv", TEXT, None)


def test_two_columns_of_one_name(tmp_path, csv_reader):
    write(tmp_path, rows__csv="text,label,label\na,x,y\nb,y,x\n", table__csv="date,load,load\n" + "1,2,3\n" * 9)
    with pytest.raises(ConfigError, match=r"label_column: .*rows\.csv has 2 columns 'label'"):
        open_dataset(f"csv_rows:{tmp_path}/rows.csv", TEXT, None)
    assert labels(open_dataset(f"csv_rows:{tmp_path}/rows.csv", TEXT | {"label_column": 2}, None)) == ["y", "x"]
    with pytest.raises(ConfigError, match=r"table\.csv, line 1: 2 columns have the name 'load'"):
        open_dataset(f"csv:{tmp_path}/table.csv", {"lookback": 1, "horizon": 1, "rows": (4, 2, 2)}, None)


FORMATS = {
    "tsv": ("text {}\tx", {"header": False}),
    "csv_rows": ('"text {}",x', {"header": False, "text_column": 0, "label_column": 1}),
    "jsonl": ('{{"text": "text {}", "label": "x"}}', {}),
}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("source", FORMATS)
def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(source, indexed, tmp_path):
    line, options = FORMATS[source]
    rows = [line.format(i) for i in range(6)]
    content = "\n \n" + "\n".join(rows[:2]) + "\n\r\n\n" + "\r\n".join(rows[2:]) + "\n" + ("{" if source == "jsonl" else "half") + "\n\n  \n\n"
    write(tmp_path, a__x=content, b__x="\n\n" + rows[0] + "\n", c__x=rows[5])
    options = TEXT | options | {"indexed": indexed, "on_bad_example": "skip"}
    dataset = open_dataset(f"{source}:{tmp_path}/*.x", options, None)
    found = [row["tokens"] for row in (dataset.splits["train"][i] for i in range(len(dataset.splits["train"]))) if not row.get("skipped", 0)]
    assert [dataset.info["tokenizer"].decode(tokens[tokens >= 0]) for tokens in found] == [f"text {i}" for i in (0, 1, 2, 3, 4, 5, 0, 5)]
    with pytest.raises(ConfigError, match=r"a\.x, (line 11|row 7):"):
        dataset = open_dataset(f"{source}:{tmp_path}/*.x", options | {"on_bad_example": "error"}, None)
        texts(dataset)


@pytest.mark.parametrize("source", [*FORMATS, "csv", "conll", "chat"])
def test_files_that_are_not_utf8_are_named(source, tmp_path):
    """The mark that spreadsheets put in front of UTF-8 is no part of the text."""
    lines = {
        "csv": "date,température\n" + "1,2\n2,3\n" * 9,
        "conll": "é\tO\n\nb\tO\n",
        "chat": '{"prompt": "é", "completion": "b"}\n',
    }
    content = lines[source] if source in lines else FORMATS[source][0].format("é") + "\n" + FORMATS[source][0].format("b") + "\n"
    options = {"lookback": 1, "horizon": 1, "rows": (4, 2, 2)} if source == "csv" else TEXT | FORMATS.get(source, ("", {}))[1]
    if source == "chat":
        options = {"sequence_length": 8, "tokenizer": "hf:x"}
        from jaxmodels.data.sources.conversations import read_conversations

        write(tmp_path, x__x=content.encode("utf-16"))
        with pytest.raises(ConfigError, match=r"x\.x is UTF-16, not UTF-8"):
            list(read_conversations(str(tmp_path / "x.x")))
        return
    write(tmp_path, x__x=b"\xef\xbb\xbf" + content.encode())
    dataset = open_dataset(f"{source}:{tmp_path}/x.x", options, None)
    assert dataset.info["columns"] == ["température"] if source == "csv" else "é" in texts(dataset)[0] and "\ufeff" not in texts(dataset)[0]
    for encoding, problem in {"latin-1": "the byte 0xe9 is not UTF-8. If the file is Latin-1 or Windows-1252", "utf-16": "is UTF-16, not UTF-8"}.items():
        write(tmp_path, x__x=content.encode(encoding))
        with pytest.raises(ConfigError, match=problem):
            open_dataset(f"{source}:{tmp_path}/x.x", options, None)


@pytest.mark.parametrize("indexed", [False, True])
def test_long_fields_and_wrong_quotes_invent_no_rows(indexed, tmp_path):
    """A pasted log of 240,000 characters and 60,000 lines is one field; after quotes that are wrong, no row is made of the middle of a field."""
    log = "x,y\n" * 60_000
    options = TEXT | {"indexed": indexed, "on_bad_example": "skip", "sequence_length": 300_000}
    write(tmp_path, a__csv=f'text,label\nfirst,neg\n"{log}",pos\nlast,neg\n')
    assert texts(open_dataset(f"csv_rows:{tmp_path}/a.csv", options, None)) == ["first", log, "last"]
    options["sequence_length"] = 8
    for middle in ('"he said "no" twice",pos', '"5" wide\nand so on",pos', '"not closed,pos'):
        write(tmp_path, b__csv=f"text,label\nfirst,neg\n{middle}\nlast,neg\n")
        with pytest.raises(ConfigError, match=r"b\.csv, line 3: .*where the next row begins is not known"):
            open_dataset(f"csv_rows:{tmp_path}/b.csv", options, None)


def test_an_array_of_objects_is_read_as_its_items(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    write(tmp_path, one__json=json.dumps(rows), many__JSON=json.dumps(rows, indent=1), cut__json=json.dumps(rows)[:-5])
    for name in ("one.json", "many.JSON"):
        dataset = open_dataset(f"jsonl:{tmp_path}/{name}", TEXT, None)
        assert texts(dataset) == ["a", "b"] and f"{tmp_path}/{name} is one JSON array" in dataset.guesses[0]
    with pytest.raises(ConfigError, match=r"many\.JSON is one JSON array, which has no index of its items"):
        open_dataset(f"jsonl:{tmp_path}/many.JSON", TEXT | {"indexed": True}, None)
    with pytest.raises(ConfigError, match=r"cut\.json: the file begins with \[, as one array of objects does, and is no JSON"):
        open_dataset(f"jsonl:{tmp_path}/cut.json", TEXT, None)


# Numbers


def table(folder, column, rows=600):
    content = "date,temperature,setpoint\n" + "".join(f"{i},{20 + np.sin(i / 4):.3f},{column(i)}\n" for i in range(rows))
    return f"csv:{write(folder, hourly__csv=content)}/hourly.csv"


def test_columns_that_hardly_change(tmp_path, csv_reader):
    """The mean of 400 times 20.1 is not 20.1 in floating point; a deviation of 3.6e-15 is none."""
    options = {"lookback": 24, "horizon": 6, "rows": (400, 100, 100)}
    with pytest.raises(ConfigError, match="setpoint never changes in the training rows"):
        open_dataset(table(tmp_path, lambda i: 20.1 if i < 400 else 20.2), options, None)
    dataset = open_dataset(table(tmp_path, lambda i: 20.1 + i % 2 * 1e-6 if i < 400 else 20.2), options, None)
    assert "'setpoint' is up to 2e+05 deviations from its mean in the training rows" in dataset.guesses[0]
    with pytest.raises(ConfigError, match="'setpoint' exceeds float32"):
        open_dataset(table(tmp_path, lambda i: i % 2 if i < 500 else 1e39), options, None)
    assert open_dataset(table(tmp_path, lambda i: 1.7e9 + 3600 * i), options, None).guesses == ()


def test_guesses_of_parts_are_said_once_with_their_names(tmp_path):
    write(tmp_path / "a", Train__tsv="a\tx\nb\ty\n")
    write(tmp_path / "b", Train__tsv="c\tx\nd\ty\n")
    sources = {name: {"source": f"tsv:{tmp_path}/{name}", "sequence_length": 8, "holdout": 0.0} for name in "ab"}
    found = open_dataset("mixture", {"sources": sources, "tokenizer": "word:100"}, None).guesses
    assert found == tuple(f"{name}: {tmp_path}/{name}: Train.tsv is train (data.train, data.validation, data.test)" for name in "ab")
    guesses.guess("nobody collects")  # outside of a data set that is opened


def test_they_are_in_the_manifest_and_printed(tmp_path, capsys):
    import jaxmodels

    for split in ("Train", "Val"):
        pictures(tmp_path / "pets" / split, "cat", "dog", count=4)
    config = {
        "model": {"name": "cnn", "features": (2,), "hidden": 2},
        "task": {"name": "classify"},
        "data": {"source": f"images:{tmp_path}/pets", "size": 8, "batch_size": 4},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "training": {"steps": 1},
    }
    jaxmodels.train(config, str(tmp_path / "run"))
    (guess,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["guesses"]
    assert "Train is train; Val is validation" in guess and "Train is train; Val is validation" in capsys.readouterr().out.replace("\n", "")
    assert not os.path.exists(tmp_path / "run" / "damaged")


# Words and tags

CONLLU = """# sent_id = 1
# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\t_
2.1\tya\tya\tADV\t_\t_\t_\t_\t_\t_
3\tmar\tmar\tNOUN\t_\t_\t1\tobl\t_\t_

# sent_id = 2
1\tNo\tno\tADV\t_\t_\t0\troot\t_\t_
"""


def tagged(dataset):
    """Return the tags of each sentence by name."""
    rows = (dataset.splits["train"][i]["tags"] for i in range(len(dataset.splits["train"])))
    return [[dataset.info["tags"][tag] for tag in row if tag >= 0] for row in rows]


def test_conllu_is_recognised_and_its_comments_and_ranges_are_no_words(tmp_path):
    write(tmp_path, train__conllu=CONLLU)
    options = {"sequence_length": 40, "tokenizer": "byte", "holdout": 0.0, "scheme": "none"}
    dataset = open_dataset(f"conll:{tmp_path}", options, None)
    assert tagged(dataset) == [["VERB", "PRON", "NOUN"], ["ADV"]] and "Vamos nos mar" in texts(dataset)[0]
    assert dataset.guesses == (f"{tmp_path}/train.conllu is CoNLL-U: words are column 1, tags are column 3 (data.token_column, data.tag_column)",)
    lemmas = open_dataset(f"conll:{tmp_path}", options | {"token_column": 2, "tag_column": 7}, None)
    assert tagged(lemmas) == [["root", "obj", "obl"], ["root"]] and lemmas.guesses == () and "ir nosotros mar" in texts(lemmas)[0]


SCHEMES = {
    "iob1": "I-A I-A B-A O I-B O I-B",
    "bioes": "B-A E-A S-A O S-B O S-B",
}


@pytest.mark.parametrize("scheme", ["iob1", "bioes", "bilou"])
def test_other_schemes_of_tags_are_converted(scheme, tmp_path):
    tags = SCHEMES["bioes" if scheme == "bilou" else scheme].split()
    tags = [tag.replace("S-", "U-").replace("E-", "L-") for tag in tags] if scheme == "bilou" else tags
    write(tmp_path, train__conll="".join(f"w{i} {tag}\n" for i, tag in enumerate(tags)))
    options = {"sequence_length": 40, "tokenizer": "byte", "holdout": 0.0}
    dataset = open_dataset(f"conll:{tmp_path}", options | {"scheme": "iob1" if scheme == "iob1" else "bioes"}, None)
    assert tagged(dataset) == ["B-A I-A B-A O B-B O B-B".split()]
    with pytest.raises(ConfigError, match=r"data\.scheme='iob1'" if scheme == "iob1" else r"data\.scheme='bioes'"):
        open_dataset(f"conll:{tmp_path}", options, None)
    write(tmp_path, train__conll="a B-A\nb I-B\n")
    if scheme != "iob1":
        with pytest.raises(ConfigError, match="line 2: the tag 'I-B' follows 'B-A'"):
            open_dataset(f"conll:{tmp_path}", options | {"scheme": "bioes"}, None)


# Numbers that 32 bits do not hold


BIG = {
    "is not finite": np.array([[1.0], [np.nan]]),
    "is too large for float32": np.array([[1.0], [1e39]]),
    "is too large for int32": np.array([[1], [2**31]]),
}


@pytest.mark.parametrize("problem", BIG)
def test_arrays_are_looked_at_before_they_are_narrowed(problem):
    data = {"train": {"x": BIG[problem], "label": np.array([0, 1])}}
    with pytest.raises(ConfigError, match=rf"data=: 'x' of train: .* {problem} \(at 1, 0\)"):
        open_dataset("arrays", {}, None, data)
    good = open_dataset("arrays", {}, None, {"train": {"x": np.array([[1.0], [2.5]]), "n": np.array([7, 2**31 - 1]), "f": np.array([True, False])}})
    kinds = {name: array.dtype for name, array in good.splits["train"].arrays.items()}
    assert kinds == {"x": np.float32, "n": np.int32, "f": np.bool_} and good.splits["train"].arrays["n"].tolist() == [7, 2**31 - 1]


@pytest.mark.parametrize("label", ["1e39", "nan", "-inf", "1" * 400])
def test_labels_beyond_float32_are_bad_examples(label, tmp_path):
    write(tmp_path, train__tsv=f"a\t1.5\nb\t{label}\n")
    with pytest.raises(ConfigError, match="line 2: the label 1 is .* not a finite number of float32"):
        open_dataset(f"tsv:{tmp_path}", TEXT | {"label": "value", "header": False}, None)


def test_epochs_that_are_rounded_say_so():
    from jaxmodels.experiment.build import build_experiment

    config = {
        "model": {"name": "cnn", "features": (2,), "hidden": 2},
        "task": {"name": "classify"},
        "data": {"source": "arrays", "batch_size": 8},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "training": {"epochs": 1},
    }
    data = {"train": {"image": np.zeros((10, 4, 4, 1), np.float32), "label": np.arange(10) % 2}}
    assert build_experiment(config, data=data).dataset.guesses == ("training.epochs=1 of 10 examples are 1.25 steps of 8, rounded to 1",)
    assert build_experiment(config | {"training": {"epochs": 4}}, data=data).dataset.guesses == ()


def test_examples_of_two_splits_are_counted(tmp_path):
    """By their inputs: the labels may differ."""
    write(tmp_path, train__tsv="a\tx\nb\ty\nc\tx\n", dev__tsv="b\tx\nd\ty\nb\ty\n", test__tsv="e\tx\n")
    found = open_dataset(f"tsv:{tmp_path}", TEXT | {"header": False}, None).guesses
    assert "2 of 3 examples of validation have inputs that an example of train has, too" in found and not any("of test" in guess for guess in found)


def test_images_of_two_splits_are_counted(tmp_path):
    """By their files: another name or class does not matter, and another picture of the same size in bytes is none."""
    for place, colour in (
        ("train/a/1", 10),
        ("train/a/2", 20),
        ("train/b/1", 30),
        ("val/a/9", 30),
        ("val/b/1", 20),
        ("val/b/2", 40),
        ("test/a/1", 50),
        ("test/b/1", 60),
    ):
        file = tmp_path / f"{place}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(file)
    for _ in range(2):  # the second time from the index
        found = open_dataset(f"images:{tmp_path}", {"size": 8}, None).guesses
        assert "2 of 3 images of validation are copies of images of train" in found and not any("of test" in guess for guess in found)


def test_a_table_keeps_what_it_was_standardised_by(tmp_path):
    options = {"lookback": 2, "horizon": 1, "rows": (10, 5, 5)}
    dataset = open_dataset(table(tmp_path, lambda i: i, rows=20), options, None)
    (past, *_), info = dataset.splits["train"][0]["past"], dataset.info
    assert past * info["deviation"] + info["mean"] == pytest.approx([20.0, 0.0], abs=1e-5)
