"""ArrayRecord files, whose records are JSON objects, msgpack maps or `tf.train.Example`s."""

import errno
import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import access, copies
from jaxmodels.data.access import FileId, Files
from jaxmodels.data.features.base import Row
from jaxmodels.data.features.table import FEATURES, choose
from jaxmodels.data.files import SplitFiles
from jaxmodels.data.index import Opened, Writer, open_index
from jaxmodels.data.indexed import IndexedBase, open_indexed
from jaxmodels.data.keys import takes
from jaxmodels.data.rows import Holdout
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.data.sources.row_values import value_of
from jaxmodels.data.sources.rows import OPTIONAL
from jaxmodels.errors import ConfigError, optional_import

RecordForm = Literal["auto", "json", "msgpack", "tf_example"]
_LISTS = ("words_column", "tags_column", "boxes_column", "box_labels_column")  # keys whose columns hold lists
_READ_AT_ONCE = 256  # records, where they are read in order


@takes(*FEATURES, SplitFiles, Holdout, optional=OPTIONAL, only_names=True, text_column="text", label_column="label")
def array_record(path: str, data_dir: str | None, *, record: RecordForm = "auto", **keys: Any) -> Dataset | Untokenized:
    """Read ArrayRecord files. Columns are the keys of their records.

    Write the files with `group_size:1`: otherwise a group of records is decompressed for each one.

    Args:
      path: as of `parquet`, with the extension `.array_record` or `.arrayrecord`. Remote files are copied to the cache, whole, as the library reads from disks only.
      data_dir: the data directory.
      record: what a record is; `auto` tells it from the first byte of the first record.

    Raises:
      ConfigError: the array-record package is missing; no such file or column; a damaged file.
    """
    features = choose(keys)
    columns = {key: column for feature in features for key, column in feature.columns().items()}
    files = SplitFiles.of(keys).find(path, data_dir, (".array_record", ".arrayrecord"), any_name=True)
    rows = {split: Records(_open(paths, f"{path} ({split})"), f"{path} ({split})", columns, record) for split, paths in files.items()}
    return open_indexed(rows, features, Holdout.of(keys), data_dir)


def _open(paths: Sequence[str], what: str) -> Opened:
    """Return the index of some files, from their footers; its header has `ends`, the records up to the end of each file."""

    def build(files: Sequence[FileId], writer: Writer) -> dict[str, Any]:
        ends, rows, crc32 = [], 0, 0
        for file in files:
            count = _reader(file.path).num_records()
            rows += count
            ends.append(rows)
            crc32 = zlib.crc32(f"{os.path.basename(file.path)} {file.size} {count}".encode(errors="surrogateescape"), crc32)
            writer.progress.add(1)
        return {"ends": ends, "crc32": crc32}

    return open_index("array_record", [access.identify(path) for path in copies.keep(paths)], build, what=what, total=len(paths), unit="files")


def _reader(path: str) -> Any:
    """Return a reader of random records; ConfigError if the file is damaged, of which the library says nothing by itself."""
    module = optional_import("array_record.python.array_record_module", "array_record")
    reader = module.ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
    if reader.ok():
        return reader
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    problem = "it is truncated"
    try:
        reader.read([0])
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
    raise ConfigError(f"{path}: not a whole ArrayRecord file: {problem}. Copy it again or leave it out.")


class Records(IndexedBase):
    """The records of ArrayRecord files."""

    def __init__(self, opened: Opened, what: str, columns: Mapping[str, str], record: RecordForm):
        """
        Args:
          opened: index of `_open`.
          what: the files in words.
          columns: key of the section -> column.
          record: what a record is.
        """
        super().__init__(opened, what)
        self.columns, self.files = dict(columns), Files(opened.index.files)
        self.ends = np.array(opened.index.header["ends"], np.int64)
        self.record = record
        if not len(self):
            return
        first = int(np.searchsorted(self.ends, 0, side="right"))
        content = self._read(first, [0])[0]
        if record == "auto":
            self.record = _form_of(content, self.files.path(first))
        record_of = self._parsed(content)
        for key, column in () if isinstance(record_of, str) else columns.items():
            if column not in record_of:
                hint = config_lib.suggest(column, record_of)
                raise ConfigError(f"config.data.{key}: the first record of {self.files.path(first)} has no {column!r}.{hint} It has {', '.join(record_of)}.")

    def __len__(self):
        return int(self.ends[-1])

    def notes(self):
        return (f"{self.what}: records are {self.record}",)

    def _read(self, file: int, places: Sequence[int]) -> list[bytes]:
        self.files.check(file)
        return _open_reader(self.files.path(file), self.files.identities[file]).read(list(places))

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, index - (int(self.ends[file - 1]) if file else 0)

    def __getitem__(self, index: int) -> Row:
        file, place = self._place(index)
        try:
            content = self._read(file, [place])[0]
        except RuntimeError as error:  # of the library
            if not os.path.isfile(self.files.path(file)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.files.path(file)) from error
            return Row(self._where(file, place), problem=f"cannot be read: {' '.join(str(error).split())[:200]}.")
        return self._row(file, place, content, self.columns)

    def scan(self, columns):
        for file, end in enumerate(self.ends.tolist()):
            count = end - (int(self.ends[file - 1]) if file else 0)
            for start in range(0, count, _READ_AT_ONCE):
                places = range(start, min(count, start + _READ_AT_ONCE))
                for place, content in zip(places, self._read(file, places), strict=True):
                    yield self._row(file, place, content, columns)

    def _where(self, file: int, place: int) -> str:
        return f"{self.files.path(file)}, record {place}"

    def _row(self, file: int, place: int, content: bytes, columns: Mapping[str, str]) -> Row:
        where, record = self._where(file, place), self._parsed(content)
        if isinstance(record, str):
            return Row(where, problem=record)
        for key, column in columns.items():
            if column not in record:
                return Row(where, problem=f"no {column!r} (data.{key}). The record has {', '.join(map(str, record))}.")
        values = {column: self._value(key, record[column]) for key, column in columns.items()}
        return Row(where, values, folder=self.files.folders[file])

    def _value(self, key: str, value: Any) -> Any:
        if self.record == "tf_example" and key not in _LISTS:
            value = value[0] if len(value) == 1 else value
        return [value_of(key, item) for item in value] if isinstance(value, list) else value_of(key, value)

    def _parsed(self, content: bytes) -> Mapping | str:
        """Return a record, or what is wrong with it."""
        try:
            record = {"json": json.loads, "msgpack": _from_msgpack, "tf_example": _from_example}[self.record](content)
        except Exception as error:  # noqa: BLE001  parsers raise several types
            return f"not {self.record}: {type(error).__name__}: {error}."
        return record if isinstance(record, Mapping) else f"a record is {type(record).__name__}, not an object with keys."


@functools.lru_cache(maxsize=256)
def _open_reader(path: str, identity: FileId) -> Any:
    """Return the reader of a file, one in a process: it may be used by several threads."""
    return _reader(path)


def _form_of(content: bytes, path: str) -> RecordForm:
    """Return what a record is, by its first byte: `{` of JSON, a map of msgpack, or the field 1 of a `tf.train.Example`."""
    first = content.lstrip()[:1]
    if first == b"{":
        return "json"
    if first and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF)):
        return "msgpack"
    if content[:1] == b"\n":
        return "tf_example"
    raise ConfigError(f"config.data.record: the records of {path} begin with {content[:8]!r}, which is no JSON object, msgpack map or tf.train.Example.")


def _from_msgpack(content: bytes) -> Any:
    return optional_import("msgpack", "array_record").unpackb(content)


@functools.cache
def _example_class() -> type:
    """Return the message `tf.train.Example`, described as in TensorFlow's `feature.proto` and `example.proto`, without TensorFlow."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="jaxmodels/example.proto", package="jaxmodels.example", syntax="proto3")

    def message(parent, name, *fields):
        added = parent.add(name=name)
        for number, (label, kind, field_name, type_name) in enumerate(fields, 1):
            added.field.add(name=field_name, number=number, label=label, type=kind, type_name=type_name and f".jaxmodels.example.{type_name}")
        return added

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    for name, kind in (("BytesList", field.TYPE_BYTES), ("FloatList", field.TYPE_FLOAT), ("Int64List", field.TYPE_INT64)):
        message(file.message_type, name, (many, kind, "value", None))
    lists = (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List"))
    feature = message(file.message_type, "Feature", *((one, field.TYPE_MESSAGE, name, kind) for name, kind in lists))
    feature.oneof_decl.add(name="kind")
    for member in feature.field:
        member.oneof_index = 0
    features = message(file.message_type, "Features", (many, field.TYPE_MESSAGE, "feature", "Features.FeatureEntry"))
    entry = message(features.nested_type, "FeatureEntry", (one, field.TYPE_STRING, "key", None), (one, field.TYPE_MESSAGE, "value", "Feature"))
    entry.options.map_entry = True
    message(file.message_type, "Example", (one, field.TYPE_MESSAGE, "features", "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("jaxmodels.example.Example"))


def _from_example(content: bytes) -> dict[str, list]:
    """Return feature -> its values."""
    features = _example_class().FromString(content).features.feature
    return {name: list(getattr(feature, feature.WhichOneof("kind")).value) if feature.WhichOneof("kind") else [] for name, feature in features.items()}
