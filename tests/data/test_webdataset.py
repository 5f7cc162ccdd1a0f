"""Tar shards of WebDataset."""

import io
import json
import tarfile
import wave

import numpy as np
import pytest
from indexed_rows import examples
from PIL import Image

from jaxmodels.data.index import Progress
from jaxmodels.data.registry import open_dataset
from jaxmodels.data.skipping import BadExample
from jaxmodels.data.tar import members
from jaxmodels.errors import ConfigError

pytestmark = pytest.mark.usefixtures("index_cache")

IMAGE = {"image_column": "jpg;png", "size": 4, "channels": 1, "holdout": 0.0}


def png(grey):
    file = io.BytesIO()
    Image.new("L", (4, 4), grey).save(file, "png")
    return file.getvalue()


def wav(values):
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(np.array(values, "<i2").tobytes())
    return file.getvalue()


def write(path, samples, form=tarfile.PAX_FORMAT):
    """Write samples, each a name and extension -> bytes."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, parts in samples:
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{name}.{extension}" if extension else name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def sample(i):
    text = json.dumps({"caption": f"a picture of {i}", "words": ["a", "b"]}).encode()
    return (f"part/{i:04}", {"png": png(i), "cls": f"{i % 2}\n".encode(), "txt": f"number {i} é".encode(), "json": text, "wav": wav([i, -i])})


@pytest.mark.parametrize("form", (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
def test_members_are_where_they_were_written(form, tmp_path):
    names = ["a.txt", "x/" * 40 + "b.png"] + (["long" * 60 + ".é.txt", "d/" * 70 + "y.jpg"] if form != tarfile.USTAR_FORMAT else [])
    write(tmp_path / "x.tar", [(name, {"": bytes([65 + i]) * (i * 700)}) for i, name in enumerate(names)], form)
    with tarfile.open(tmp_path / "x.tar", "a", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a" * (150 if form != tarfile.USTAR_FORMAT else 9)
        tar.addfile(link)
    content = (tmp_path / "x.tar").read_bytes()
    found = [(name, content[offset : offset + size]) for name, offset, size in members(str(tmp_path / "x.tar"), Progress("", 1))]
    assert found == [(name, bytes([65 + i]) * (i * 700)) for i, name in enumerate(names)]


def test_images_captions_labels_and_audio(tmp_path):
    write(tmp_path / "s-0.tar", [("__key__", {"txt": b"meta"}), *map(sample, range(20)), ("no_extension", {"": b"x"})])
    write(tmp_path / "s-1.tar", map(sample, range(20, 30)))
    read = examples(open_dataset(f"webdataset:{tmp_path}", IMAGE, None), "train")
    assert read["image"][:, 0, 0, 0].tolist() == list(range(30)) and read["label"].tolist() == [0, 1] * 15
    audio = {"audio_column": "wav", "samples": 3, "sample_rate": 8000, "label": "none", "holdout": 0.0}
    read = examples(open_dataset(f"webdataset:{tmp_path}/s-*.tar", audio, None), "train")
    np.testing.assert_array_equal(read["audio"] * 2**15, [[i, -i, 0] for i in range(30)])
    for column, start in (("txt", "number"), ("json.caption", "a picture of")):
        text = {"text_column": column, "sequence_length": 9, "tokenizer": "word:99", "label": "none", "holdout": 0.0}
        dataset = open_dataset(f"webdataset:{tmp_path}/s-?.tar", text, None)
        shown = dataset.info["tokenizer"].decode(dataset.splits["train"][21]["tokens"])
        assert shown.startswith(f"{start} 21")
    assert dataset.splits["train"].rows[21].where == f"{tmp_path}/s-1.tar, sample part/0021"


def test_images_with_captions(tmp_path):
    write(tmp_path / "x.tar", map(sample, range(8)))
    keys = IMAGE | {"text_column": "txt", "sequence_length": 5, "tokenizer": "byte", "label": "none"}
    read = examples(open_dataset(f"webdataset:{tmp_path}/x.tar", keys, None), "train")
    assert read["image"].shape == (8, 4, 4, 1) and bytes(read["tokens"][3].astype(np.uint8)) == b"numbe"


def test_wrong_tar_files_are_named(tmp_path):
    write(tmp_path / "x.tar", map(sample, range(9)))
    content = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(tmp_path / "x.tar", "x.txt")
    (tmp_path / "short.tar").write_bytes(content[: 5 * 512])
    (tmp_path / "cut.tar").write_bytes(content[: 5 * 512 + 100])
    (tmp_path / "no_end.tar").write_bytes(content[: 4 * 512 + 100])
    (tmp_path / "bits.tar").write_bytes(content[:1024] + b"\xff" * 20 + content[1044:])
    for name, message in (
        ("z", "compressed.*gunzip"),
        ("short", "damaged or truncated: unexpected end of data"),
        ("cut", "damaged or truncated: unexpected end of data"),
        ("no_end", "truncated: it ends after 2,148"),
        ("bits", "byte 1,024 is no header"),
    ):
        with pytest.raises(ConfigError, match=f"{name}.tar: .*{message}"):
            open_dataset(f"webdataset:{tmp_path}/{name}.tar", IMAGE, None)
    with pytest.raises(ConfigError, match="image_column: no sample of .* has a member 'jpeg'.*They have png, cls, txt, json, wav"):
        open_dataset(f"webdataset:{tmp_path}/x.tar", IMAGE | {"image_column": "jpeg"}, None)


def test_bad_samples_are_named_or_weigh_nothing(tmp_path):
    samples = [sample(i) for i in range(6)]
    samples[2][1]["png"] = b"no image"
    del samples[4][1]["cls"]
    write(tmp_path / "x.tar", samples)
    options = IMAGE | {"labels": ("0", "1")}
    dataset = open_dataset(f"webdataset:{tmp_path}/x.tar", options, None)
    for index, message in ((2, "x.tar, sample part/0002: cannot be decoded as an image"), (4, "x.tar, sample part/0004: no member 'cls'")):
        with pytest.raises(BadExample, match=message):
            dataset.splits["train"][index]
    skipped = examples(open_dataset(f"webdataset:{tmp_path}/x.tar", options | {"on_bad_example": "skip"}, None), "train")["skipped"]
    assert skipped.tolist() == [0, 0, 1, 0, 1, 0]


def test_flac(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    values = np.arange(-300, 300, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, np.stack([values, values], 1), 8000, format="FLAC")
    write(tmp_path / "x.tar", [("a", {"flac": file.getvalue()}), ("b", {"flac": file.getvalue()[:90]})])
    keys = {"audio_column": "wav;flac", "samples": 700, "sample_rate": 8000, "label": "none", "holdout": 0.0}
    train = open_dataset(f"webdataset:{tmp_path}/x.tar", keys, None).splits["train"]
    np.testing.assert_array_equal(train[0]["audio"][:600] * 2**15, values)
    assert train[0]["audio_length"] == 600
    with pytest.raises(BadExample, match="sample b: cannot be decoded as WAV or FLAC audio"):
        train[1]
