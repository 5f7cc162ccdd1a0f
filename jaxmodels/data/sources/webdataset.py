"""WebDataset: tar files whose members with one name and different extensions are one example."""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data import access
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
from jaxmodels.data.sources.rows import OPTIONAL, json_object
from jaxmodels.data.tar import members
from jaxmodels.errors import ConfigError

_SAMPLES = 4096  # indexed at once


@takes(*FEATURES, SplitFiles, Holdout, optional=OPTIONAL, only_names=True, text_column="txt", label_column="cls")
def webdataset(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read tar files of WebDataset: consecutive members `NAME.jpg`, `NAME.txt`, … are an example; extensions are its columns.

    A column may name alternatives, `jpg;png`, and a value in a JSON member: `json.caption`. Texts are UTF-8.

    Args:
      path: as of `parquet`, with the extension `.tar`.
      data_dir: the data directory.

    Raises:
      ConfigError: no such file; a tar file that is compressed, damaged or truncated; no member has an extension.
    """
    features = choose(keys)
    columns = {key: column for feature in features for key, column in feature.columns().items()}
    files = SplitFiles.of(keys).find(path, data_dir, (".tar",), any_name=True)
    rows = {split: Samples(_open(paths, f"{path} ({split})"), f"{path} ({split})", columns) for split, paths in files.items()}
    return open_indexed(rows, features, Holdout.of(keys), data_dir)


def _open(paths: Sequence[str], what: str) -> Opened:
    """Return the index of some files, from the headers of their members.

    Its arrays: `first` [samples + 1], the first member of each sample; of each member `offset` and `size` of its bytes and `kind`, a number of
    `header["kinds"]`; and `names`, the bytes of all names, with `name_end` of each sample. `header["sample_ends"]` has the samples up to the end of
    each file.
    """

    def build(files: Sequence[FileId], writer: Writer) -> dict[str, Any]:
        kinds: dict[str, int] = {}
        ends, crc32, samples, count, name_end = [], 0, 0, 0, 0
        columns: dict[str, list] = {name: [] for name in ("first", "offset", "size", "kind", "name_end")}
        names = bytearray()

        def flush():
            for name, values in columns.items():
                writer.append(name, values, np.uint16 if name == "kind" else np.int64)
                values.clear()
            writer.append("names", np.frombuffer(bytes(names), np.uint8), np.uint8)
            names.clear()

        for file in files:
            sample = None
            for name, offset, size in members(file.path, writer.progress):
                found = re.fullmatch(r"((?:.*/)?[^/.][^/.]*)\.([^/]+)", name)
                if found is None or (found[1].startswith("__") and found[1].endswith("__")):
                    continue  # as WebDataset does with members without an extension, hidden ones and __meta__
                crc32 = zlib.crc32(f"{name} {size}".encode(errors="surrogateescape"), crc32)
                if found[1] != sample:
                    sample = found[1]
                    encoded = sample.encode(errors="surrogateescape")
                    name_end += len(encoded)
                    samples += 1
                    names += encoded
                    columns["first"].append(count)
                    columns["name_end"].append(name_end)
                columns["offset"].append(offset)
                columns["size"].append(size)
                columns["kind"].append(kinds.setdefault(found[2].lower(), len(kinds)))
                count += 1
                if len(columns["first"]) > _SAMPLES:
                    flush()
            ends.append(samples)
        columns["first"].append(count)
        flush()
        return {"kinds": list(kinds), "sample_ends": ends, "crc32": crc32}

    return open_index("webdataset", access.identify_all(paths), build, what=what)


class Samples(IndexedBase):
    """The samples of tar files."""

    def __init__(self, opened: Opened, what: str, columns: Mapping[str, str]):
        """
        Args:
          opened: index of `_open`.
          what: the files in words.
          columns: key of the section -> column.
        """
        super().__init__(opened, what)
        self.columns, self.files = dict(columns), Files(opened.index.files)
        self.ends = np.array(opened.index.header["sample_ends"], np.int64)
        kinds = opened.index.header["kinds"]
        for key, column in columns.items():
            if kinds and not any(kind in kinds for kind in _alternatives(column)):
                hint = config_lib.suggest(column, kinds)
                raise ConfigError(f"config.data.{key}: no sample of {what} has a member {column!r}.{hint} They have {', '.join(kinds)}.")

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Row:
        return self._row(index, self.columns)

    def scan(self, columns):
        return (self._row(index, columns) for index in range(len(self)))

    def _row(self, index: int, columns: Mapping[str, str]) -> Row:
        arrays = self.opened.index
        file = int(np.searchsorted(self.ends, index, side="right"))
        begin, end = arrays["first"][index : index + 2].tolist()
        name_begin, name_end = (int(arrays["name_end"][index - 1]) if index else 0), int(arrays["name_end"][index])
        name = arrays["names"][name_begin:name_end].tobytes().decode(errors="surrogateescape")
        where = f"{self.files.path(file)}, sample {name}"
        kinds = [arrays.header["kinds"][kind] for kind in arrays["kind"][begin:end]]
        values: dict[str, Any] = {}
        for key, column in columns.items():
            kind = next((kind for kind in _alternatives(column) if kind in kinds), None)
            if kind is None:
                return Row(where, problem=f"no member {column!r} (data.{key}). The sample has {', '.join(kinds)}.")
            member = begin + kinds.index(kind)
            offset, size = int(arrays["offset"][member]), int(arrays["size"][member])
            content = self.files.read(file, offset, offset + size)
            if kind == "json" and column != kind:
                record = json_object(content)
                field = column.removeprefix("json.")
                if isinstance(record, str) or field not in record:
                    return Row(where, problem=f"the member json has no {field!r} (data.{key})" + (f": {record}" if isinstance(record, str) else "."))
                values[column] = record[field]
            else:
                values[column] = value_of(key, content)
        return Row(where, values, folder=self.files.folders[file])


def _alternatives(column: str) -> list[str]:
    """Return the extensions that a column may be, `jpg;png`; a value in a JSON member is in `json`."""
    return ["json" if kind.startswith("json.") else kind.lower() for kind in column.split(";")]
