"""Data for each source, in a folder and at addresses: what the tests of remote data share."""

import io
import json
import wave

import numpy as np
import pytest
import tokenizer_folders
from array_records import example, write
from indexed_rows import TEXT, records
from PIL import Image

from jaxmodels.data.registry import open_dataset
from jaxmodels.storage import client, paths

ROWS = TEXT | {"indexed": True}
# name -> source, path, options. "MODEL" stands for the folder of a tokenizer.
CASES = {
    "images": ("images", "pictures", {"size": 4}),
    "images-dot": ("images", "pictures/train", {"size": 4, "train": ".", "holdout": 0.25}),
    "text": ("text", "docs/**/*.txt, docs/more.jsonl", {"sequence_length": 8, "validation": "valid.txt", "tokenizer": "bpe:300"}),
    "text-gz": ("text", "docs/packed.txt.gz", {"sequence_length": 8, "tokenizer": "byte"}),
    "chat": ("chat", "talks.jsonl", {"sequence_length": 32, "tokenizer": "MODEL", "template": "template.jinja", "holdout": 0.5}),
    "conll": ("conll", "tags", {"sequence_length": 8, "tokenizer": "word:50"}),
    "csv": ("csv", "table.csv", {"lookback": 3, "horizon": 2, "rows": (20, 10, 10)}),
    "tsv": ("tsv", "tsv", ROWS),
    "csv_rows": ("csv_rows", "rows-{split}.csv", {"image_column": "image", "size": 4, "label_column": "label", "text_column": None, "indexed": True}),
    "jsonl": ("jsonl", "tsv/rows.jsonl", ROWS | {"validation": "tsv/validation.jsonl"}),
    "audio": ("jsonl", "sounds.jsonl", {"audio_column": "sound", "samples": 50, "sample_rate": 8000, "indexed": True}),
    "tokenizer": ("tsv", "tsv", ROWS | {"tokenizer": "MODEL/tokenizer.json"}),
    "parquet": ("parquet", "parquet", TEXT),
    "webdataset": ("webdataset", "shards/*.tar", {"image_column": "png", "label_column": "cls", "size": 4}),
    "array_record": ("array_record", "records", TEXT),
    "hf": ("hf", "saved", ROWS),
    "tfds": ("tfds", "tiny", {}),
}
NEEDS = {"parquet": "pyarrow", "array_record": "array_record", "hf": "datasets", "tfds": "tensorflow_datasets"}


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((5 + number % 3, 6, 3), 7 * number % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_data(root):
    """Write data for each source into a folder."""
    files = {f"pictures/{split}/{kind}/{i}.png": png(i) for split, n in (("train", 6), ("val", 3)) for kind in ("cat", "dog") for i in range(n)}
    files |= {f"pictures/train/dog/{name}.png": png(20) for name in ("a b", "é#1", "50%+x", "q?x", "[x]", "a%20b")}
    files |= {"pictures/train/cat/more/9.png": png(9), "pictures/train/cat/.hidden": b"x", "pictures/train/dog/Thumbs.db": b"x"}
    files |= {"docs/a.txt": "the cat sat " * 9, "docs/in/b.txt": "on the mat\n" * 9, "docs/in/.c.txt": "hidden", "docs/.d/e.txt": "hidden"}
    files |= {"docs/more.jsonl": as_lines([{"text": "more of it"}] * 4), "valid.txt": "the end of the cat " * 3, "docs/other.md": "no text"}
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the cat"}]
    files |= {"talks.jsonl": as_lines([{"messages": talk}] * 4), "template.jinja": tokenizer_folders.CHATML}
    files |= {"tags/train.conll": "Ann\tB-PER\n\nLee\tB-PER\nran\tO\n\nno\tO\n", "tags/Dev/x.conll": "Ann\tB-PER\n", "tags/test.txt": "Lee\tB-PER\n"}
    files |= {"table.csv": "date,a,b\n" + "".join(f"{i},{i * i % 17},{np.sin(i)}\n" for i in range(45))}
    texts = [(row["text"], row["label"]) for row in records(30)]
    files |= {f"tsv/train-{part}.tsv": "".join(f"{text}\t{label}\n" for text, label in texts[part::2]) for part in range(2)}
    files |= {"tsv/VALID.tsv": "w1 é\todd\n", "tsv/rows.jsonl": as_lines(records(30)), "tsv/validation.jsonl": as_lines(records(5, 3))}
    files |= {f"rows-{split}.csv": "image,label\n" + "".join(f"pictures/{split}/cat/{i}.png,{i % 2}\n" for i in range(3)) for split in ("train", "val")}
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((np.arange(60) * 300).astype("<i2").tobytes())
    files |= {"sounds/a.wav": sound.getvalue(), "sounds.jsonl": as_lines([{"sound": "sounds/a.wav", "label": "x"}] * 2)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ none }}"}
    files |= {"model/config.json": {"model_type": "llama", "vocab_size": 330}, "model/tokenizer_config.json": settings}
    files |= {"model/tokenizer.json": tokenizer_folders.byte_level(["<|im_start|>", "<|im_end|>"]).to_str()}
    features = {"image": {"image": {"dtype": "uint8", "shape": {"dimensions": ["5", "6", "3"]}}, "pythonClassName": _tfds("image_feature.Image")}}
    features |= {"label": {"classLabel": {"numClasses": "2"}, "pythonClassName": _tfds("class_label_feature.ClassLabel")}}
    info = {"fileFormat": "array_record", "name": "tiny", "version": "1.0.0", "splits": [_split("train", 8), _split("test", 2)]}
    at = "tensorflow_datasets/tiny/1.0.0"
    files |= {f"{at}/features.json": {"featuresDict": {"features": features}, "pythonClassName": _tfds("features_dict.FeaturesDict")}}
    files |= {f"{at}/dataset_info.json": info | {"moduleName": "tiny.tiny"}}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    _write_others(root)


def _tfds(name):
    return f"tensorflow_datasets.core.features.{name}"


def _split(name, rows):
    return {"filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "name": name, "numBytes": "100", "shardLengths": [str(rows)]}


def _write_others(root):
    """Write the files of formats that libraries write, where these are installed."""
    import gzip
    import tarfile

    (root / "docs" / "packed.txt.gz").write_bytes(gzip.compress(b"packed text of a cat " * 20))
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(6):
                for name, content in ((f"{i}.png", png(i + shard)), (f"{i}.cls", str(i % 2).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for name in ("parquet", "records"):
        (root / name).mkdir()
    try:
        import pyarrow
        import pyarrow.parquet

        for split, rows in (("train", records(40)), ("validation", records(5, 40))):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "parquet" / f"{split}.parquet", row_group_size=7)
        import datasets

        parts = {"train": datasets.Dataset.from_list(records(20)), "valid": datasets.Dataset.from_list(records(5, 20))}
        datasets.DatasetDict(parts).save_to_disk(root / "saved")
        write(root / "records" / "train.array_record", [json.dumps(row).encode() for row in records(20)])
        write(root / "records" / "dev.array_record", [json.dumps(row).encode() for row in records(5, 20)])
        for split, rows in (("train", 8), ("test", 2)):
            path = root / "tensorflow_datasets" / "tiny" / "1.0.0" / f"tiny-{split}.array_record-00000-of-00001"
            write(path, [example(image=png(3 * i), label=i % 2) for i in range(rows)])
    except ImportError:  # the cases that need them are skipped
        pass


def opened(name, place, data, relative=False, model=None):
    """Open a case by addresses below a place, or relative to it."""
    source, path, options = CASES[name]

    def below(value):
        if not isinstance(value, str) or value == ".":
            return value
        at = model or (data if "memory" in str(place) else place)  # models are read from disks and buckets
        if value == "MODEL":
            return "hf:model" if relative and at == place else f"hf:{at}/model"
        if value.startswith("MODEL"):
            return f"{at}/model/tokenizer.json"
        return f"{place}/{value}" if not relative and (value.split(".")[-1] in ("txt", "jsonl", "jinja")) else value

    where = path if relative or source == "tfds" else ",".join(f"{place}/{part.strip()}" for part in path.split(","))
    options = {key: below(value) for key, value in options.items()}
    return open_dataset(f"{source}:{where}", options, str(place) if relative or source == "tfds" else None)


PLACES = ["file", "memory", pytest.param("s3", marks=pytest.mark.buckets), pytest.param("gs", marks=pytest.mark.buckets)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with data for each source."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module", params=PLACES)
def root(request, data):
    """The address of a copy of the data."""
    if request.param == "file":
        return f"file://{data}"
    if request.param == "memory":
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(f"{data}/", "/remote-data/", recursive=True)
        return "memory://remote-data"
    request.getfixturevalue("bucket_servers")
    from bucket_servers import BUCKET

    address = f"{request.param}://{BUCKET}/remote-data"
    paths.upload(data, paths.parse(address))
    for key in ("pictures/train/", "pictures/train/cat/", "docs/in/"):  # as consoles of clouds make folders
        client.result(client.store(request.param, BUCKET).write(f"remote-data/{key}", b""), address)
    return address
