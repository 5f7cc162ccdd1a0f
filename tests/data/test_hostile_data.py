"""Files of data from an attacker: each is a bad example or an error that names the file, in bounded memory."""

import io
import json
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxmodels import config as config_lib
from jaxmodels.data.registry import open_dataset
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.runs.folder import RunFolder

pytestmark = pytest.mark.faults

IMAGES = {"image_column": "image", "label_column": "label", "size": 8, "holdout": 0.0}


def png(width: int, height: int, rows: int | None = None) -> bytes:
    """A black PNG without its last rows."""
    packer = zlib.compressobj(9)
    line = bytes(1 + width)
    content = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("P", (8, 8), number % 250) for number in range(frames)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], loop=0)
    return file.getvalue()


def with_exif(size: int) -> bytes:
    """A JPEG whose EXIF data claims `size` entries."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", size) + b"\x01\x12\0\x03\xff\xff\xff\xff\xff\xff\xff\xff")
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\nshowpage\n%%EOF\n"
# name -> file, and the problem; None if the image is read.
FILES = {
    "large": (png(13_000, 13_000, rows=1), r"it has 13000 × 13000 pixels, and data.max_pixels=67,108,864"),
    "beyond Pillow's limit": (png(60_000, 60_000, rows=1), "60000|exceeds limit"),
    "no pixels": (png(0, 8), "cannot be decoded as an image"),
    "truncated": (png(16, 16)[:40], "cannot be decoded as an image"),
    "empty": (b"", "cannot be decoded as an image"),
    "program": (EPS, "it is a PostScript program, not an image"),
    "animation": (gif(200), None),
    "exif": (with_exif(65_535), None),
}


@pytest.mark.parametrize("name", FILES)
def test_images(tmp_path, name):
    content, problem = FILES[name]
    (tmp_path / "x.bin").write_bytes(content)
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "x.bin", "label": "a"}) + "\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, on the size
        source = open_dataset(f"jsonl:{tmp_path}", IMAGES, None).splits["train"]
        if problem is None:
            assert source[0]["image"].shape == (8, 8, 3)
        else:
            with pytest.raises(RunError, match=problem) as error:
                source[0]
            assert "train.jsonl, line 1" in str(error.value) and error.value.exit_status == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB; the pixels of the large image are 165 MB


def test_the_limit_of_pixels_is_a_key(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "x.png", "label": "a"}) + "\n")
    assert open_dataset(f"jsonl:{tmp_path}", IMAGES | {"max_pixels": 100}, None).splits["train"][0]["image"].shape == (8, 8, 3)
    with pytest.raises(RunError, match=r"it has 10 × 10 pixels, and data.max_pixels=99"):
        open_dataset(f"jsonl:{tmp_path}", IMAGES | {"max_pixels": 99}, None).splits["train"][0]
    with pytest.raises(ConfigError, match="max_pixels must be at least 1"):
        open_dataset(f"jsonl:{tmp_path}", IMAGES | {"max_pixels": 0}, None)


DEEP = "[" * 200_000
TEXTS = {"text_column": "text", "label_column": "label", "sequence_length": 4, "tokenizer": "byte", "holdout": 0.0}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("train.jsonl", '{"text": "a", "label": "b"}\n{"text": ' + DEEP + "\n", "train.jsonl, line 2: not JSON: maximum recursion depth"),
        ("train.jsonl", '{"text": ' + "9" * 5000 + ', "label": "b"}\n', "train.jsonl, line 1: not JSON: Exceeds the limit"),
        ("train.csv", 'text,label\na,b\n"' + "x" * 200_000 + '"y,b\nc,d\n', "train.csv, line 3: .*where the next row begins is not known"),
        ("train.csv", 'text,label\na,b\n"' + "x\n" * 200_000, "train.csv, line 3: .*where the next row begins is not known"),
        ("train.csv", "text,label\na,b\n" + "," * 100_000 + "\n", "train.csv, line 3: the row has 100001 columns"),
    ],
)
def test_rows(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem) as error:
        open_dataset(f"{'jsonl' if name.endswith('jsonl') else 'csv_rows'}:{tmp_path}", TEXTS, None).splits["train"]
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'date,x\n1,"' + b"9" * 200_000 + b'"\n', "line 2: 'x' is inf, which is not finite"),
        (b"date,x\n1,\xff\n", r"line 2: 'x' is '.udcff', not a number"),
        (b'date,x\n1,"2\n3,4\n', "line 2: not comma-separated values"),
    ],
)
def test_tables_of_numbers(tmp_path, csv_reader, content, problem):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=f"x.csv, {problem}"):
        open_dataset(f"csv:{tmp_path}/x.csv", {"lookback": 1, "horizon": 1, "rows": (1, 1, 1)}, None)


def test_configs_and_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"model":' + DEEP)
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        config_lib.load_config(str(tmp_path / "config.json"))
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        RunFolder(tmp_path).config()
    (tmp_path / "manifest.json").write_text('{"starts":' + DEEP)
    assert RunFolder(tmp_path).damaged_manifest() == "it is no JSON" and RunFolder(tmp_path).manifest() == {}
    (tmp_path / "metrics.jsonl").write_text(DEEP + '\n{"step": 1, "split": "train", "loss": 1.0}\n')
    assert len(RunFolder(tmp_path).metrics()) == 1 and list(RunFolder(tmp_path).damaged_metrics()) == [1]
    np.testing.assert_equal(RunFolder(tmp_path).metrics()[0]["loss"], 1.0)
