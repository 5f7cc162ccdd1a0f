"""Data sets of the Hugging Face `datasets` library, as `save_to_disk` writes them: texts or images."""

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np

from jaxmodels import config as config_lib
from jaxmodels.data.features import Column, Label, Options, Row, class_names, hold_out, open_rows
from jaxmodels.data.files import NAMES, find_folder
from jaxmodels.data.skipping import BadExample, Forgiving, Policy
from jaxmodels.data.source import Dataset, fingerprint
from jaxmodels.data.sources.images import blank_image, check_size, to_array
from jaxmodels.errors import ConfigError, optional_import


class ImageRows:
    """Rows with an image and a label: `image` uint8 [H, W, C], `label` int32, decoded when read.

    A row that cannot be decoded raises BadExample when it is read.
    """

    def __init__(self, rows, column: str, numbers: np.ndarray, where: str, *, size: tuple[int, int], channels: int, fit: str):
        """
        Args:
          rows: of the library.
          column: its images.
          numbers: int32 [examples, 2]: the row of each, and its class, -1 if it has none of them.
          where: data set and split, for errors.
          size, channels, fit: see `images.images`.
        """
        self.rows, self.column, self.numbers, self.where = rows, column, numbers, where
        self.form = (size, channels, fit)

    def __len__(self):
        return len(self.numbers)

    def fingerprint(self) -> int:
        """A checksum of rows and classes; the images are not read."""
        return fingerprint(self.numbers)

    def check_labels(self) -> None:
        """Raises BadExample at the first row with a label that is no class."""
        for row, label in self.numbers:
            if label < 0:
                raise BadExample(f"{self.where}, row {row}", "its label is none of the classes of train.")

    def __getitem__(self, index):
        row, label = self.numbers[index]
        if label < 0:
            raise BadExample(f"{self.where}, row {row}", "its label is none of the classes of train.")
        try:
            pixels = to_array(self.rows[int(row)][self.column], *self.form)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  what a decoder raises depends on where the image is broken
            raise BadExample(f"{self.where}, row {row}", f"{self.column!r} cannot be decoded as an image: {error}.") from error
        return {"image": pixels, "label": label}


def huggingface(
    path: str,
    data_dir: str | None,
    *,
    sequence_length: int | None = None,
    tokenizer: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    label: Label = "class",
    labels: tuple[str, ...] | None = None,
    source_column: str | None = None,
    target_column: str | None = None,
    target_length: int | None = None,
    truncate: bool = True,
    image_column: str | None = None,
    size: int | tuple[int, ...] | None = None,
    channels: Literal[1, 3, 4] = 3,
    fit: Literal["crop", "stretch"] = "crop",
    holdout: float = 0.1,
    on_bad_example: Policy = "error",
) -> Dataset:
    """A `Dataset`, which trains, or a `DatasetDict` with the splits `train`, `validation` (or `valid`, `val`, `dev`) and `test`.

    Texts as from `rows.jsonl`, by `sequence_length` and `tokenizer`; or with `image_column` and `size`, images as from
    `images.images`. A column of the library's ClassLabel has the classes it names.

    Args:
      path: the folder that `save_to_disk` wrote, relative to the working directory or else to the data directory.
      image_column: of the images.
      data_dir, and all others: as of `rows.tsv` and `images.images`.

    Raises:
      ConfigError: the `datasets` package is missing, no such folder or column; with `error` also a bad row.
    """
    datasets = optional_import("datasets", "huggingface")
    folder = find_folder(path, data_dir)
    try:
        opened = datasets.load_from_disk(folder)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise ConfigError(f"config.data.source: {folder} is not what datasets' save_to_disk writes: {error}") from error
    parts = _splits(dict(opened) if isinstance(opened, datasets.DatasetDict) else {"train": opened}, folder)
    if image_column is not None:
        form = {"size": check_size(size), "channels": channels, "fit": fit}
        return _images(parts, folder, image_column, label_column, form, holdout, on_bad_example)
    if sequence_length is None or tokenizer is None:
        raise ConfigError("config.data: give sequence_length and tokenizer, for texts, or image_column and size, for images.")
    options = {key: value for key, value in locals().items() if key in config_lib.fields(Options)}
    names = _class_label(parts["train"], label_column) if label == "class" and source_column is None else None
    options = Options(**options | ({"labels": names} if labels is None and names else {}))
    return open_rows({split: _rows(part, f"{folder} {split}", options.columns, names) for split, part in parts.items()}, options, data_dir)


def _splits(parts: Mapping, folder: str) -> dict:
    """The library's splits by our names."""
    found = {}
    for split, names in NAMES.items():
        there = [name for name in names if name in parts]
        if len(there) > 1:
            raise ConfigError(f"config.data.source: {folder} has {' and '.join(there)}, both for {split}; keep one.")
        if there:
            found[split] = parts[there[0]]
    if "train" not in found:
        raise ConfigError(f"config.data.source: {folder} has no split 'train', but {', '.join(parts)}.")
    return found


def _check_column(part, key: str, column: str, where: str) -> None:
    if column not in part.column_names:
        hint = config_lib.suggest(column, part.column_names)
        raise ConfigError(f"config.data.{key}: {where} has no column {column!r}.{hint} It has {', '.join(part.column_names)}.")


def _class_label(part, column: str) -> tuple[str, ...] | None:
    """The names of a column of ClassLabel."""
    return tuple(getattr(part.features.get(column), "names", None) or ()) or None


def _rows(part, where: str, columns: Mapping[str, Column], names: tuple[str, ...] | None) -> Iterator[Row]:
    for key, column in columns.items():
        _check_column(part, key, column, where)
    for i, record in enumerate(part.select_columns(list(columns.values()))):
        values = [_name(record[column], names) if key == "label_column" else record[column] for key, column in columns.items()]
        yield Row(f"{where}, row {i}", values)


def _name(value, names: tuple[str, ...] | None):
    """The name of a ClassLabel's number; a number out of its range stays, and is told of as a bad label."""
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


def _images(parts: Mapping, folder: str, column: str, label_column: str, form: Mapping, holdout: float, policy: Policy) -> Dataset:
    for split, part in parts.items():
        _check_column(part, "image_column", column, f"{folder} {split}")
        _check_column(part, "label_column", label_column, f"{folder} {split}")
    given = _class_label(parts["train"], label_column)
    found = {split: [_name(value, given) for value in part[label_column]] for split, part in parts.items()}
    names = list(given or class_names([Row(f"{folder} train, row {i}", (None, value)) for i, value in enumerate(found["train"])]))
    numbers = {name: i for i, name in enumerate(names)}
    rows = {split: [(i, numbers.get(str(value).strip(), -1)) for i, value in enumerate(values)] for split, values in found.items()}
    if "validation" not in rows and holdout:
        rows["train"], rows["validation"] = hold_out(rows["train"], holdout)
        parts = {**parts, "validation": parts["train"]}
    splits = {split: ImageRows(parts[split], column, np.array(rows[split], np.int32), f"{folder} {split}", **form) for split in rows}
    for split, source in splits.items():
        if policy == "skip":
            splits[split] = Forgiving(source, blank_image(form["size"], form["channels"]))
        else:
            source.check_labels()
    return Dataset(splits, {"image_shape": (*form["size"], form["channels"]), "num_classes": len(names), "labels": names})
