"""The files of each split."""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

from jaxmodels import config as config_lib
from jaxmodels.data import access, folders
from jaxmodels.data.evaluation_sets import EvaluationSets, key_of
from jaxmodels.data.guesses import guess
from jaxmodels.errors import ConfigError

# Names that a split's file or folder may have, in any capitals.
NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "testing")}
# What operating systems and archives leave in folders. Names that begin with a dot are left out, too.
_LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or was left by an operating system or an archive."""
    return name.startswith(".") or name.lower() in _LITTER


def splits_by_name(names: Iterable[str], where: str) -> tuple[dict[str, str], list[str]]:
    """Return split -> the one of some names that is its, in any capitals, and the other names, sorted.

    Raises:
      ConfigError: two names are of one split.
    """
    rest, found = sorted(names), {}
    for split, known in NAMES.items():
        there = [name for name in rest if name.lower() in known]
        if len(there) > 1:
            raise ConfigError(f"config.data.source: {where} has {' and '.join(there)}, both for {split}; choose one with --config.data.{split}=NAME.")
        if there:
            found[split] = there[0]
            rest.remove(there[0])
    return found, rest


def guess_splits(found: Mapping[str, str], left_out: Sequence[str], where: str) -> None:
    """Record which names were taken for which splits, unless they are the splits' own, and which were left out."""
    odd = {split: name for split, name in found.items() if split != name}
    said = [f"{name} is {split}" for split, name in odd.items()]
    said += [f"{', '.join(left_out[:8])}{', …' if len(left_out) > 8 else ''} {'are' if len(left_out) > 1 else 'is'} not used"] if left_out else []
    if said:
        guess(f"{where}: {'; '.join(said)} (data.train, data.validation, data.test)")


def places(path: str, data_dir: str | None, key: str = "config.data.source") -> list[str]:
    """Return where a file or folder may be: at a path or address itself, and, if that is relative, below the data directory.

    Args:
      path: the path, pattern or address; one of `file://` becomes a path.
      data_dir: the data directory, which may be an address.
      key: the config key or argument that holds the path, for errors.

    Raises:
      ConfigError: a misspelt address.
    """
    path = access.address(path, key)
    relative = bool(data_dir) and not os.path.isabs(path) and not access.is_remote(path)
    return [path, access.join(access.address(data_dir, "--data_dir"), path)] if relative else [path]


def find_file(path: str, data_dir: str | None, key: str = "config.data.source") -> str:
    """Return the path or address of a file: `path` itself, or below the data directory; ConfigError names both places."""
    tried = places(path, data_dir, key)
    found = next((place for place in tried if access.is_file(place)), None)
    if found is None:
        raise ConfigError(f"{key}: there is no file {' nor '.join(tried)}. Give an absolute path, or its folder with --data_dir=DIR or JAXMODELS_DATA_DIR.")
    return found


def find_folder(path: str, data_dir: str | None) -> str:
    """Return a folder: `path` itself, or below the data directory; ConfigError names both places."""
    tried = places(path, data_dir)
    folder = next((place for place in tried if access.is_folder(place)), None)
    if folder is None:
        raise ConfigError(f"config.data.source: there is no folder {' nor '.join(tried)}; give it with --data_dir=DIR or JAXMODELS_DATA_DIR.")
    return folder


@dataclasses.dataclass(kw_only=True)
class SplitFiles(EvaluationSets):
    """Keys of sources that read files of each split.

    Attributes:
      train, validation, test: path or pattern of that split's files, where their names do not tell.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None

    def find(self, path: str, data_dir: str | None, extensions: tuple[str, ...], any_name: bool = False) -> dict[str, list[str]]:
        """Return the files of each split, sorted.

        Args:
          path: a folder (its files `NAME.tsv`, `NAME-*.tsv` or `NAME/*.tsv`, NAME as in `NAMES` and in any capitals), a pattern with
            `{split}` in it, or a file or a pattern of files, which all train.
          data_dir: where relative paths are looked for after the working directory; the keys also relative to the folder.
          extensions: of the files in a folder: `(".tsv",)`.
          any_name: whether all files of a folder train if none has the name of a split.

        Raises:
          ConfigError: nothing is found, or more than one name of a split.
        """
        return _split_files(path, data_dir, self.given(), extensions, any_name)


def _split_files(path: str, data_dir: str | None, given: Mapping[str, str], extensions: tuple[str, ...], any_name: bool) -> dict[str, list[str]]:
    tried = places(path, data_dir)
    folder = next((place for place in tried if access.is_folder(place)), None)
    if folder is not None:
        there = folders.entries(folder)
        found = {split: _in_folder(folder, there, split, extensions) for split in NAMES if not given.get(split)}
        own = sorted(access.join(folder, name) for name in _with_extension(there.files, extensions))
        if any_name and not any(found.values()) and not given:
            found["train"] = own
        elif not given:
            used = {file for files in found.values() for file in files}
            first = {split: os.path.relpath(files[0], folder) for split, files in found.items() if files}
            odd = {split: name for split, name in first.items() if not name.startswith(split)}
            guess_splits(odd, [os.path.basename(file) for file in own if file not in used], folder)
    elif "{split}" in path:
        found = next((files for place in tried if any((files := {s: _by_pattern(place, s) for s in NAMES}).values())), {})
    else:
        found = {"train": next((files for place in tried if (files := folders.glob(place))), [])}
        if found["train"] and given.get("train"):
            raise ConfigError(f"config.data.train: the training file is {path!r} already; give a folder, or leave train out.")
    for split, own in given.items():
        roots = [folder, "", access.address(data_dir, "--data_dir") if data_dir else None]
        at = list(dict.fromkeys(access.join(root, access.address(own, key_of(split))) for root in roots if root is not None))
        found[split] = next((files for place in at if (files := folders.glob(place))), [])
        if not found[split]:
            raise ConfigError(f"{key_of(split)}: there is no file {' nor '.join(at)}.")
    found = {split: files for split, files in found.items() if files}
    if "train" not in found:
        raise ConfigError(_nothing(path, tried, folder, extensions))
    return found


def find_files(paths: str, data_dir: str | None, key: str = "config.data.source") -> list[str]:
    """Return the files of a comma-separated list of paths, addresses and shell patterns (`*`, `**` for any folders); each file once.

    Args:
      paths: in order; the matches of a pattern are sorted. Relative to the working directory or else to the data directory.
      data_dir: the data directory.
      key: the config key or argument that names them, for errors.

    Raises:
      ConfigError: nothing is found for one of them.
    """
    found = []
    whole = "," in paths and any(map(access.is_file, places(paths, data_dir, key)))  # its name may hold a comma
    for path in [paths] if whole else [path.strip() for path in paths.split(",")]:
        tried = places(path, data_dir, key)
        files = next((files for place in tried if path and (files := folders.glob(place))), None)
        if files is None:
            folder = next((place for place in tried if path and access.is_folder(place)), None)
            if folder is not None:
                raise ConfigError(f"{key}: {folder} is a folder; give a pattern of its files: {os.path.join(path, '**', '*.txt')}")
            raise ConfigError(f"{key}: there is no file {' nor '.join(tried)}. Give an absolute path, or its folder with --data_dir=DIR or JAXMODELS_DATA_DIR.")
        found += files
    return list(dict.fromkeys(found))


def _with_extension(names: Iterable[str], extensions: tuple[str, ...]) -> list[str]:
    """Return the names with one of some extensions, in any capitals; those of the first extension come first."""
    shown = [name for name in names if not name.startswith(".")]
    return [name for extension in extensions for name in shown if name.lower().endswith(extension)]


def _in_folder(folder: str, there: folders.Entries, split: str, extensions: tuple[str, ...]) -> list[str]:
    """Return the files of a split in a folder: `NAME.EXTENSION`, or else `NAME-*.EXTENSION`, or else those of the folder `NAME`, in any capitals."""
    by_name: dict[str, list[str]] = {}
    files = _with_extension(there.files, extensions)
    for name in NAMES[split]:
        alone = [file for file in files if file.lower().removeprefix(name) in extensions]
        parts = [file for file in files if file.lower().startswith(f"{name}-")]
        below = [] if alone or parts else [each for each in there.folders if each.lower() == name]
        inside = [os.path.join(each, file) for each in below for file in _with_extension(folders.entries(access.join(folder, each)).files, extensions)]
        for file in alone or parts or inside:
            by_name.setdefault(file[: len(name)], []).append(access.join(folder, file))
    return _only(by_name, split, folder)


def _by_pattern(pattern: str, split: str) -> list[str]:
    return _only({name: files for name in NAMES[split] if (files := folders.glob(pattern.replace("{split}", name)))}, split, pattern)


def _only(by_name: Mapping[str, list[str]], split: str, where: str) -> list[str]:
    if len(by_name) > 1:
        files = " and ".join(by_name[name][0] for name in sorted(by_name))
        raise ConfigError(f"config.data.source: {where} has {files}; choose one with --config.data.{split}=FILE.")
    return next(iter(by_name.values()), [])


def _nothing(path: str, tried: list[str], folder: str | None, extensions: tuple[str, ...]) -> str:
    if folder is not None:
        names = sorted(itertools.chain(*folders.entries(folder)))
        hint = config_lib.suggest("train" + extensions[0], names)
        return (
            f"config.data.source: {folder} has no train{extensions[0]}, but {', '.join(names[:8]) or 'nothing'}.{hint} "
            "Name the training file with --config.data.train=FILE."
        )
    return (
        f"config.data.source: there is no file or folder {' nor '.join(tried)}. Give an absolute path, or its folder "
        "with --data_dir=DIR or JAXMODELS_DATA_DIR; {split} in a path stands for train, validation (or dev, valid, val) and test."
    )
