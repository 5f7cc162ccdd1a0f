"""Whatever is in a file, a reader gives the examples that a slow one gives, or one error that names the place.

JAXMODELS_FUZZ (40) inputs for each reader: JAXMODELS_FUZZ=5000 pytest tests/data/test_fuzz.py
"""

import json
import os
import re
import shutil
import tempfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from jaxmodels.data.registry import open_dataset
from jaxmodels.errors import ConfigError

fuzzed = hypothesis.settings(
    max_examples=int(os.environ.get("JAXMODELS_FUZZ", "40")),
    deadline=None,
    derandomize="JAXMODELS_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
PIECES = [
    "a",
    "b",
    " ",
    "\t",
    ",",
    '"',
    "\n",
    "\r\n",
    "\r",
    "\ufeff",
    "é",
    "0",
    "-1",
    "\0",
    "text",
    "label",
    "{",
    "}",
    "[",
    "]",
    ":",
    "\\",
    "O",
    "B-X",
    "I-X",
    "#",
]
ROWS = {
    "tsv": ["a\t0\n", "b\t1\n", "text\tlabel\n"],
    "csv_rows": ["a,0\n", '"b,""c""\nd",1\n', "text,label\n"],
    "jsonl": ['{"text": "a", "label": 0}\n', '{"text": "b", "label": 1}\n', '{"text": 1}\n', "[1]\n"],
    "conll": ["a O\n", "b B-X\n", "\n", "c I-X\n", "1\ta\t_\tX\t_\t_\t_\t_\t_\t_\n"],
    "csv": ["1,2\n", "3,4.5\n", "date,x\n", "5,nan\n"],
}


def contents(source):
    """Files of good rows and of pieces of all kinds, and of any bytes."""
    text = strategies.lists(strategies.sampled_from(ROWS[source] * 3 + PIECES), max_size=30).map("".join)
    return strategies.one_of(text.map(str.encode), strategies.binary(max_size=40), text.map(lambda t: t.encode("latin-1", "replace")))


# Slow readers, each a few lines: the rows of a file as lists of texts, or None where a row or the file is no good


def slow_lines(content):
    text = content.decode("utf-8")
    return [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if line.strip(" \r")]


def slow_tsv(content):
    return [line.split("\t") for line in slow_lines(content)]


def slow_csv(content):
    """Return the records of RFC 4180, character by character; None if quotation marks are wrong."""
    text, records, record, field, state = content.decode("utf-8").removeprefix("\ufeff"), [], [], "", "start"
    text = text if text.endswith(("\n", "\r")) else text + "\n"
    i = 0
    while i < len(text):
        c = text[i]
        if state == "quoted":
            if c == '"':
                state = "after"
            else:
                field += c
        elif state == "after" and c == '"':
            field, state = field + c, "quoted"
        elif c in "\r\n":
            if c == "\r" and text[i + 1 : i + 2] == "\n":
                i += 1
            record.append(field)
            if not (len(record) == 1 and not record[0].strip(" \r\n")):
                records.append(record)
            record, field, state = [], "", "start"
        elif c == ",":
            record.append(field)
            field, state = "", "start"
        elif state == "after":
            return None
        elif c == '"' and state == "start":
            state = "quoted"
        else:
            field, state = field + c, "plain"
        i += 1
    return None if state == "quoted" else records


def slow_json(content):
    rows = []
    for line in slow_lines(content):
        row = json.loads(line)
        rows.append([row["text"], row["label"]])
    return rows


SLOW = {"tsv": slow_tsv, "csv_rows": slow_csv, "jsonl": slow_json}


def open_content(source, content, options):
    """Return the data set of a file with some contents, or the error."""
    folder = tempfile.mkdtemp()
    try:
        path = os.path.join(folder, "x.file")
        with open(path, "wb") as file:
            file.write(content)
        dataset = open_dataset(f"{source}:{path}", options, None)
        return [dataset.splits["train"][i] for i in range(len(dataset.splits["train"]))], dataset.info
    except ConfigError as error:
        assert "x.file" in str(error) or "config.data" in str(error), error
        assert len(str(error)) < 2000
        return str(error)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("source", SLOW)
def test_rows_are_those_of_a_slow_reader_or_an_error(source, indexed):
    options = {"sequence_length": 200, "tokenizer": "byte", "holdout": 0.0, "indexed": indexed}
    options |= {} if source == "jsonl" else {"header": False, "text_column": 0, "label_column": 1}

    @fuzzed
    @hypothesis.given(contents(source))
    def check(content):
        found = open_content(source, content, options)
        if isinstance(found, str):
            return
        rows = SLOW[source](content)
        assert rows is not None, "the quotation marks are wrong, and rows were made all the same"
        assert len({len(row) for row in rows}) == 1
        examples, info = found
        texts = [info["tokenizer"].decode(example["tokens"][example["tokens"] >= 0]) for example in examples]
        assert texts == [row[0] for row in rows]
        assert [info["labels"][int(example["label"])] for example in examples] == [str(row[1]).strip() for row in rows]

    check()


@pytest.mark.parametrize("source", SLOW)
def test_good_rows_are_read(source):
    """The fuzz is no proof if every input is an error."""
    options = {"sequence_length": 20, "tokenizer": "byte", "holdout": 0.0}
    options |= {} if source == "jsonl" else {"header": False, "text_column": 0, "label_column": 1}
    content = "".join(ROWS[source][:2]).encode()
    examples, _ = open_content(source, content, options)
    assert len(examples) == len(SLOW[source](content)) == 2


def test_sentences_have_the_words_and_tags_of_their_lines():
    @fuzzed
    @hypothesis.given(contents("conll"))
    def check(content):
        found = open_content("conll", content, {"sequence_length": 200, "tokenizer": "byte", "holdout": 0.0})
        if isinstance(found, str):
            return
        blocks = re.split(r"\n(?:[ \r]*\n)+", "\n" + content.decode().removeprefix("\ufeff").replace("\r\n", "\n") + "\n\n")
        blocks = [[line for line in block.split("\n") if line.strip(" \r")] for block in blocks]
        examples, info = found
        ends = [[(line.split("\t") if "\t" in line else line.split()) for line in block] for block in blocks if block]
        tags = [[info["tags"][tag] for tag in example["tags"] if tag >= 0] for example in examples]
        if not content.count(b"\t") >= 9:  # not CoNLL-U
            assert tags == [[fields[-1].strip() for fields in sentence] for sentence in ends]

    check()


def test_tables_have_the_numbers_of_their_fields():
    @fuzzed
    @hypothesis.given(contents("csv"))
    def check(content):
        found = open_content("csv", b"date,x\n" + content, {"lookback": 1, "horizon": 1, "rows": (2, 2, 2)})
        if isinstance(found, str):
            return
        rows = slow_csv(b"date,x\n" + content)
        values = np.array([float(row[1]) for row in rows[1:]])
        assert np.isfinite(values).all() and len(values) >= 6
        examples, _ = found
        scaled = (values - values[:2].mean()) / values[:2].std()
        np.testing.assert_allclose(examples[0]["past"].ravel(), scaled[:1], rtol=1e-4, atol=1e-5)

    check()
