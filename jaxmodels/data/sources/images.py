"""Folders of images, one folder a class."""

import contextlib
import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from jaxmodels import config as config_lib
from jaxmodels.data import access, fitted, folders
from jaxmodels.data.access import FileId, is_remote
from jaxmodels.data.evaluation_sets import EvaluationSets, is_named, key_of
from jaxmodels.data.features.base import Row
from jaxmodels.data.features.image import Image
from jaxmodels.data.features.label import Label
from jaxmodels.data.files import find_folder, guess_splits, is_litter, splits_by_name
from jaxmodels.data.guesses import guess
from jaxmodels.data.holdout import Part, Whole
from jaxmodels.data.index import Opened, Writer, open_index
from jaxmodels.data.indexed import IndexedBase, open_indexed
from jaxmodels.data.keys import takes
from jaxmodels.data.rows import Holdout
from jaxmodels.data.skipping import BadExample
from jaxmodels.data.source import Dataset, Untokenized
from jaxmodels.errors import ConfigError

_ROWS = 4096  # files indexed or read at once
_END = 4096  # bytes at each end of a file that are compared


class ClassFolders(IndexedBase):
    """Rows of files in a folder for each class, with the columns `image`, a path, and `label`, the class."""

    def __init__(self, opened: Opened, folder: str):
        """
        Args:
          opened: index of `_open`.
          folder: of the split.
        """
        super().__init__(opened, folder)
        self.folder, self.classes = folder, opened.index.header["classes"]
        self.ends = np.array(opened.index.header["ends"], np.int64)

    def __len__(self):
        return int(self.ends[-1])

    def _file(self, index: int) -> tuple[str, int]:
        """Return the path of a file relative to the folder of the split, and the number of its class."""
        ends = self.opened.index["name_end"]
        name = self.opened.index["names"][int(ends[index - 1]) if index else 0 : int(ends[index])].tobytes()
        number = int(np.searchsorted(self.ends, index, side="right"))
        return os.path.join(self.classes[number], name.decode(errors="surrogateescape")), number

    def __getitem__(self, index: int) -> Row:
        name, number = self._file(index)
        path = os.path.join(self.folder, name)
        return Row(path, {"image": path, "label": self.classes[number]})

    def scan(self, columns):
        return (self[index] for index in range(len(self)))

    def fingerprint(self, part: Part | Whole) -> int:
        """Return a checksum of names, sizes in bytes and classes; the contents are not read."""

        def compute() -> int:
            index, result, separator = self.opened.index, 0, b""
            for start in range(0, len(self), _ROWS):
                stop = min(len(self), start + _ROWS)
                rows = np.flatnonzero(part.mask(start, stop))
                if not len(rows):
                    continue
                ends = index["name_end"][start:stop]
                begin = int(index["name_end"][start - 1]) if start else 0
                names, cuts = index["names"][begin : int(ends[-1])].tobytes(), [0, *(ends - begin).tolist()]
                numbers = np.searchsorted(self.ends, start + rows, side="right").tolist()
                described = zip(rows.tolist(), index["size"][start + rows].tolist(), numbers, strict=True)
                lines = [b"%b %d %d" % (names[cuts[row] : cuts[row + 1]].rpartition(b"/")[2], size, number) for row, size, number in described]
                result = zlib.crc32(separator + b"\n".join(lines), result)
                separator = b"\n"
            return result

        share = None if isinstance(part, Whole) else [part.held, len(part)]
        return self.opened.index.derived(["crc32", share], compute)


def _open(folder: str, leave_out: Collection[str] = ()) -> Opened:
    """Return the index of the images of a split.

    Its arrays: `names`, the bytes of all names relative to the folder of the class, with `name_end` of each image, and its `size` in bytes. Its header
    has the `classes`, and `ends`, the images up to the end of each; and `suspect`, files that by name or size are no images.

    Args:
      folder: has a folder for each class.
      leave_out: names of folders in it that are no classes.
    """
    classes = [name for name in folders.entries(folder).folders if not is_litter(name) and name not in leave_out]
    identities = folders.identify([os.path.join(folder, name) for name in classes], is_litter)

    def build(_: Sequence[FileId], writer: Writer) -> dict[str, Any]:
        ends, count, name_end, suspect = [], 0, 0, []
        for name in classes:
            sizes = _sizes(os.path.join(folder, name))
            files = list(sizes)
            for at in range(0, len(files), _ROWS):
                few = files[at : at + _ROWS]
                names = [file.encode(errors="surrogateescape") for file in few]
                writer.append("names", np.frombuffer(b"".join(names), np.uint8), np.uint8)
                name_ends = name_end + np.cumsum([len(each) for each in names])
                name_end = int(name_ends[-1])
                writer.append("name_end", name_ends)
                writer.append("size", [sizes[file] for file in few])
                suspect += [os.path.join(name, file) for file in few if not (sizes[file] and _is_named(file))]
            count += len(files)
            ends.append(count)
            writer.progress.add(1)
        return {"classes": classes, "ends": ends, "suspect": suspect}

    return open_index("images", identities, build, key=sorted(leave_out), what=folder, total=len(classes), unit="classes")


@dataclasses.dataclass(kw_only=True)
class SplitFolders(EvaluationSets):
    """Keys of folders of images.

    Attributes:
      train, validation, test: folder of that split in the folder of the source, where names do not tell; `.` for the folder itself.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None

    def find(self, folder: str) -> dict[str, tuple[str, list[str]]]:
        """Return split -> its folder, and the names in it that are no classes but other splits."""
        given = {split: os.path.normpath(name) for split, name in self.given().items()}
        for split, name in given.items():
            if not access.is_folder(_below(folder, name)):
                names = [name for name in itertools.chain(*folders.entries(folder)) if not is_litter(name)]
                raise ConfigError(f"{key_of(split)}: {folder} has no folder {name!r}.{config_lib.suggest(name, names)}")
        if "train" not in given:
            given = self._by_name(folder, given) | given
        return {split: (_below(folder, name), list({*given.values()} - {name}) if name == "." else []) for split, name in given.items()}

    @staticmethod
    def _by_name(folder: str, given: Mapping[str, str]) -> dict[str, str]:
        """Return the folders of splits by their names; the folder itself trains if there is none."""
        main = [name for split, name in given.items() if not is_named(split)]  # a further set may be a main one, too
        names = [name for name in folders.entries(folder).folders if not is_litter(name) and name not in main]
        found, rest = splits_by_name(names, folder)
        rest = [name for name in rest if name not in given.values()]
        if not found:
            return {"train": "."}
        if len(found) + len(given) == 1 and rest:
            raise ConfigError(
                f"config.data.source: {folder} has the folder {names_of(found)}, which is the name of a split, beside {names_of(rest)}. "
                f"If all are classes, set data.train=. ; if not, name the folder that trains with data.train."
            )
        if "train" not in found:
            raise ConfigError(f"config.data.source: {folder} has {names_of(found)}, but no folder 'train'; name it with data.train=FOLDER.")
        guess_splits(found, rest, folder)
        return found


def _below(folder: str, name: str) -> str:
    """Return the path of a folder in another one; `.` is that one itself."""
    if is_remote(folder):
        return folder if name == "." else access.join(folder, name)
    return os.path.normpath(os.path.join(folder, name))


def names_of(names: Mapping[str, str] | Sequence[str]) -> str:
    """Return some names in words."""
    shown = [repr(name) for name in (names.values() if isinstance(names, Mapping) else names)]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")


@takes(Image, SplitFolders, Holdout, without=("image_column",), required=("size",))
def images(path: str, data_dir: str | None, **keys: Any) -> Dataset | Untokenized:
    """Read images in folders: `PATH/train/CLASS/*`, with the folders `validation` (or `valid`, `val`, `dev`) and `test` next to it, or `PATH/CLASS/*`.

    Every file in the folder of a class and in the folders below is an image of it, also through links, except hidden files and what operating
    systems leave in folders, such as `Thumbs.db`. Classes are the names of the folders, sorted. Splits may be written in any capitals. A remote folder is
    listed at each start, and each image is read in one request when an example needs it.

    Args:
      path: relative to the working directory or else to the data directory, or an address.
      data_dir: the data directory.

    Raises:
      ConfigError: no such folder, no images, or classes that differ between splits; with `on_bad_example='error'` also a file that is no image by
        its name and first bytes, or an empty one.
    """
    image, options = Image.of(keys | {"image_column": "image"}), Holdout.of(keys)
    folder = find_folder(path, data_dir)
    rows = {split: ClassFolders(_open(*place), place[0]) for split, place in SplitFolders.of(keys).find(folder).items()}
    known = fitted.get("labels")
    classes = rows["train"].classes if known is None else known
    for split, part in rows.items():
        lacking = [] if known is not None or is_named(split) else sorted(set(classes) - set(part.classes))  # other data may lack some classes
        odd = min([*lacking, *(set(part.classes) - set(classes))], default=None)
        if odd is not None:
            trained = "train" if known is None else "the training data"
            has, lacks = (split, trained) if odd in part.classes else (trained, split)
            raise ConfigError(f"config.data.source: {folder}: the class {odd!r} is in {has}, but not in {lacks}.")
        _check_suspects(part, options)
        if split != "train" and known is None and not is_remote(folder) and (count := _copies(rows["train"], part)):
            guess(f"{count:,} of {len(part):,} images of {split} are copies of images of train")
    return open_indexed(rows, [image, Label(label_column="label", labels=tuple(classes))], options, data_dir)


def _check_suspects(rows: ClassFolders, options: Holdout) -> None:
    """Raise BadExample if a file is no image by its first bytes, unless bad examples are skipped. Only files whose names do not say so are opened."""
    suspects = rows.opened.index.header["suspect"] if options.on_bad_example == "error" else ()
    for name in suspects:
        path = os.path.join(rows.folder, name)
        if not access.identify(path).size:
            raise BadExample(path, "the file is empty.")
        try:
            with access.open_file(path) as file, PillowImage.open(file):
                pass
        except PillowImage.UnidentifiedImageError as error:
            raise BadExample(path, "it is no image. Delete it, or move it out of the folders of classes.") from error


def _copies(train: ClassFolders, other: ClassFolders) -> int:
    """Return how many images of another split train has, too: files of the same size, and the same first and last bytes.

    Only files whose sizes occur in both splits are opened, and once: the index stores the result.
    """

    sizes = [rows.opened.index["size"] for rows in (train, other)]

    def contents(rows: ClassFolders, size: np.ndarray, both: np.ndarray) -> Iterator[tuple[int, int, int]]:
        for index in np.flatnonzero(np.isin(size, both)).tolist():
            with contextlib.suppress(OSError), open(rows[index].values["image"], "rb") as file:  # an error when the image is read
                first = file.read(_END)
                file.seek(max(0, int(size[index]) - _END))
                yield int(size[index]), zlib.crc32(first), zlib.crc32(file.read(_END))

    def compute() -> int:
        both = np.intersect1d(*sizes)
        known = set(contents(train, sizes[0], both))
        return sum(content in known for content in contents(other, sizes[1], both))

    return train.opened.index.derived(["copies", other.fingerprint(Whole(len(other)))], compute)


def _is_named(file: str) -> bool:
    """Whether a file has the extension of an image."""
    return _is_extension(file[file.rfind(".") :])


@functools.cache
def _is_extension(text: str) -> bool:
    return text.lower() in PillowImage.registered_extensions()


def _sizes(folder: str) -> dict[str, int]:
    found = folders.sizes_below(folder, is_litter)
    if not found:
        raise ConfigError(f"config.data.source: {folder} holds no image.")
    return found
