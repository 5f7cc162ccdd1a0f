"""Reading and writing the safetensors format, against its library; and invalid files."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import folder as folder_lib
from jaxmodels.pretrained.safetensors import DTYPES, ToWrite, in_files, read_header, write

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHAPES = {"matrix": (3, 5), "scalar": (), "empty": (0, 4), "long": (7,)}


def raw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return random bytes as an array of a type, without unused bits."""
    dtype = DTYPES[name]
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    return (values.astype(np.float32) - 50.5).astype(dtype) if name[0] in "FB" and name != "BOOL" else values


def to_write(x: np.ndarray) -> ToWrite:
    return ToWrite(x.shape, x.dtype, lambda: x)


def test_every_type_is_in_this_table():
    assert TORCH.keys() == DTYPES.keys()


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_a_type_are_read_and_written(tmp_path, name):
    ours = {key: raw(name, shape) for key, shape in SHAPES.items()}
    write(tmp_path / "ours", {key: to_write(x) for key, x in ours.items()}, {"format": "pt", "note": "ünïcode"})
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for key, x in theirs.items():
        assert x.dtype == TORCH[name] and tuple(x.shape) == SHAPES[key]
        assert x.flatten().view(torch.uint8).numpy().tobytes() == ours[key].tobytes()
    safetensors.torch.save_file(theirs, tmp_path / "theirs", {"format": "pt"})
    found = read_header(tmp_path / "theirs")
    assert found.keys() == ours.keys()
    for key, tensor in found.items():
        assert tensor.dtype == DTYPES[name] and tensor.shape == SHAPES[key] and tensor.nbytes == ours[key].nbytes
        assert np.asarray(tensor.view()).tobytes() == ours[key].tobytes()


def test_a_slice_reads_no_more_than_itself(tmp_path):
    """Single values of a tensor of a tebibyte, most of which is a hole in the file."""
    rows, columns = 2**20, 2**18
    header = json.dumps({"large": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}}).encode()
    start = 8 + len(header)
    with open(tmp_path / "large", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(start + 4 * (123_456 * columns + 5))
        file.write(np.float32([1.5, 2.5]).tobytes())
        file.truncate(start + rows * columns * 4)
    view = read_header(tmp_path / "large")["large"].view()
    assert view.shape == (rows, columns) and view[123_456, 4:8].tolist() == [0, 1.5, 2.5, 0]
    assert view.T[5:7, 123_456:123_458].tolist() == [[1.5, 0], [2.5, 0]]


def test_tensors_are_requested_one_at_a_time_and_files_are_complete_or_absent(tmp_path):
    order = []

    def values(name, x):
        order.append(name)
        return x

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "good", {name: ToWrite((3, 2), x.dtype, lambda name=name: values(name, x.T)) for name in "ba"}, {})
    assert order == ["b", "a"]
    np.testing.assert_array_equal(safetensors.torch.load_file(tmp_path / "good")["a"].numpy(), x.T)
    for wrong in (x, x.T.astype(np.float16)):
        with pytest.raises(ValueError, match=r"a: expected float32 \(3, 2\), got float"):
            write(tmp_path / "bad", {"a": ToWrite((3, 2), np.dtype(np.float32), lambda wrong=wrong: wrong)}, {})
    assert not (tmp_path / "bad").exists()


def test_files_are_filled_in_order_up_to_their_size():
    tensors = {name: to_write(np.zeros(size, np.uint8)) for name, size in {"a": 4, "b": 6, "c": 20, "d": 1, "e": 9, "f": 1}.items()}
    assert [list(group) for group in in_files(tensors, 10)] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def file_of(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD = {
    "no length": (b"1234", "not a complete safetensors file: it has 4 bytes"),
    "nothing": (b"", "not a complete safetensors file"),
    "a length beyond the file": (file_of({}, length=1000), "its header should have 1,000"),
    "a length beyond all files": (file_of({}, length=2**63), "its header should have 9,223,372,036,854,775,808"),
    "a pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00weightq\x01K\x01u.", "not a complete safetensors file"),
    "a page of the web": (b"<!DOCTYPE html><html>404</html>", "not a complete safetensors file"),
    "no JSON": (file_of(b"{not json"), "invalid safetensors header"),
    "no text": (file_of(b"\xff\xfe\x00\x01"), "invalid safetensors header"),
    "a list": (file_of([1, 2]), "invalid safetensors header"),
    "a deep list": (file_of(b"[" * 100_000), "invalid safetensors header"),
    "an entry that is none": (file_of({"a": 3}), "a lacks dtype, shape or data_offsets"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}), "a lacks dtype, shape or data_offsets"),
    "offsets of another kind": (file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}, b"1234"), "a has an invalid shape or offsets"),
    "three offsets": (file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234"), "a has an invalid shape or offsets"),
    "a shape of another kind": (file_of({"a": entry(None, 0, 4)}, b"1234"), "a has an invalid shape or offsets"),
    "a negative size": (file_of({"a": entry([-1, -1], 0, 4)}, b"1234"), "a has an invalid shape or offsets"),
    "a size that is no whole number": (file_of({"a": entry([1.0], 0, 4)}, b"1234"), "a has an invalid shape or offsets"),
    "a size that is true": (file_of({"a": entry([True], 0, 4)}, b"1234"), "a has an invalid shape or offsets"),
    "an unknown type": (file_of({"a": entry([1], 0, 4, "F4")}, b"1234"), "a has the unknown type 'F4'"),
    "a type of another kind": (file_of({"a": entry([1], 0, 4, ["F32"])}, b"1234"), "a has the unknown type"),
    "a lie about the size": (file_of({"a": entry([2], 0, 4)}, b"1234"), r"a \[2\] of F32 needs 8 bytes, but its offsets span 4"),
    "offsets the wrong way": (file_of({"a": entry([1], 4, 0)}, b"1234"), "needs 4 bytes, but its offsets span -4"),
    "an overlap": (file_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"1" * 12), "invalid offset of b in the header"),
    "a gap": (file_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1" * 12), "invalid offset of b in the header"),
    "a start after the start": (file_of({"a": entry([1], 4, 8)}, b"1" * 8), "invalid offset of a in the header"),
    "a file cut off": (file_of({"a": entry([2], 0, 8)}, b"1" * 7), "is truncated: expected .* bytes by its header"),
    "a file too long": (file_of({"a": entry([2], 0, 8)}, b"1" * 9), "is too long: expected .* bytes by its header"),
    "a size beyond all memory": (file_of({"a": entry([2**62, 2**62], 0, 2**126)}, b"1" * 8), "is truncated"),
}


@pytest.mark.parametrize("kind", BAD)
def test_invalid_files_are_errors(tmp_path, kind):
    content, problem = BAD[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "again" in str(error.value)
    with pytest.raises(Exception):  # noqa: B017, PT011  the library fails, too; the type of its error does not matter
        safetensors.torch.load_file(path)


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_every_truncation_of_a_file_is_an_error(tmp_path, cut):
    write(tmp_path / "whole", {"a": to_write(np.zeros((4, 8), np.float32)), "b": to_write(np.zeros(3, np.float32))}, {})
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-cut])
    with pytest.raises(ConfigError, match="is truncated|not a complete safetensors file"):
        read_header(tmp_path / "cut")


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards and their index."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for i, name in enumerate("ab"):
        write(tmp_path / f"{name}.safetensors", {name: to_write(np.full(2, i, np.float32))}, {})
    index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    return tmp_path


def index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors(path):
    return folder_lib.find(f"hf:{path}", weights=True).tensors()


def test_shards_are_read_together(sharded):
    assert {name: tensor.view().tolist() for name, tensor in tensors(sharded).items()} == {"a": [0, 0], "b": [1, 1]}


def test_bad_folders_are_refused(sharded):
    def error(change):
        copy = sharded / "copies" / str(len(os.listdir(sharded / "copies")))
        shutil.copytree(sharded, copy, ignore=shutil.ignore_patterns("copies"))
        change(copy)
        with pytest.raises(ConfigError) as raised:
            tensors(copy)
        return str(raised.value)

    (sharded / "copies").mkdir()
    assert "lacks b.safetensors, one of its 2 files" in error(lambda path: (path / "b.safetensors").unlink())
    assert "lists c in b.safetensors, which does not contain it" in error(lambda path: index(path, {"a": "a.safetensors", "c": "b.safetensors"}))
    swapped = error(lambda path: index(path, {"a": "b.safetensors", "b": "a.safetensors"}))
    assert "lists a in b.safetensors, which does not contain it" in swapped
    for outside in ("../a.safetensors", str(sharded / "a.safetensors"), "sub/a.safetensors", "..", ""):
        assert f"names the file {outside!r}, which is outside the folder" in error(lambda path, outside=outside: index(path, {"a": outside}))
    assert "no weight_map" in error(lambda path: index(path, ["a"]))
    assert "no weight_map" in error(lambda path: index(path, {"a": 3}))
    assert "cannot be read as JSON" in error(lambda path: (path / "model.safetensors.index.json").write_text("{"))
    assert "holds no JSON object" in error(lambda path: (path / "model.safetensors.index.json").write_text("[]"))

    def only(path, *names):
        for file in path.glob("*.safetensors*"):
            file.unlink()
        for name in names:
            (path / name).write_bytes(b"\x80\x02}q\x00.")

    assert "has its weights in pytorch_model.bin, a pickle" in error(lambda path: only(path, "pytorch_model.bin"))
    assert "model.ckpt, a pickle" in error(lambda path: only(path, "model.ckpt"))
    assert "it contains no weights" in error(only)
