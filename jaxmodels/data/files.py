"""The files of each split."""

import dataclasses
import glob
import os
from collections.abc import Iterable, Mapping, Sequence

from jaxmodels import config as config_lib
from jaxmodels.data import access
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


def find_folder(path: str, data_dir: str | None) -> str:
    """Return a folder: `path` itself, or below the data directory; ConfigError names both places."""
    places = _places(path, data_dir)
    folder = next((place for place in places if os.path.isdir(place)), None)
    if folder is None:
        raise ConfigError(f"config.data.source: there is no folder {' nor '.join(places)}; give it with --data_dir=DIR or JAXMODELS_DATA_DIR.")
    return folder


def _places(path: str, data_dir: str | None) -> list[str]:
    return [path] + ([os.path.join(data_dir, path)] if data_dir and not os.path.isabs(path) and not access.is_remote(path) else [])


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
    places = _places(path, data_dir)
    folder = next((place for place in places if access.is_folder(place)), None)
    if folder is not None:
        found = {split: _in_folder(folder, split, extensions) for split in NAMES if not given.get(split)}
        there = sorted(file for e in extensions for file in _glob(os.path.join(glob.escape(folder), f"*{_any_case(e)}")))
        if any_name and not any(found.values()) and not given:
            found["train"] = there
        elif not given:
            used = {file for files in found.values() for file in files}
            first = {split: os.path.relpath(files[0], folder) for split, files in found.items() if files}
            odd = {split: name for split, name in first.items() if not name.startswith(split)}
            guess_splits(odd, [os.path.basename(file) for file in there if file not in used], folder)
    elif "{split}" in path:
        found = next((files for place in places if any((files := {s: _by_pattern(place, s) for s in NAMES}).values())), {})
    else:
        found = {"train": next((files for place in places if (files := _glob(place))), [])}
        if found["train"] and given.get("train"):
            raise ConfigError(f"config.data.train: the training file is {path!r} already; give a folder, or leave train out.")
    for split, own in given.items():
        roots = [root for root in (folder, "", data_dir) if root is not None]
        found[split] = next((files for root in roots if (files := _glob(os.path.join(root, own)))), [])
        if not found[split]:
            raise ConfigError(f"{key_of(split)}: there is no file {' nor '.join(os.path.join(root, own) for root in roots)}.")
    found = {split: files for split, files in found.items() if files}
    if "train" not in found:
        raise ConfigError(_nothing(path, places, folder, extensions))
    return found


def find_files(paths: str, data_dir: str | None, key: str = "config.data.source") -> list[str]:
    """Return the files of a comma-separated list of paths and shell patterns (`*`, `**` for any folders); each file once.

    Args:
      paths: in order; the matches of a pattern are sorted. Relative to the working directory or else to the data directory.
      data_dir: the data directory.
      key: the config key or argument that names them, for errors.

    Raises:
      ConfigError: nothing is found for one of them.
    """
    found = []
    whole = os.path.isfile(paths) or (data_dir and os.path.isfile(os.path.join(data_dir, paths)))  # its name may hold a comma
    for path in [paths] if whole else [path.strip() for path in paths.split(",")]:
        places = [path] + ([os.path.join(data_dir, path)] if data_dir and not os.path.isabs(path) else [])
        files = next((files for place in places if path and (files := _glob(place))), None)
        if files is None:
            folder = next((place for place in places if path and os.path.isdir(place)), None)
            if folder is not None:
                raise ConfigError(f"{key}: {folder} is a folder; give a pattern of its files: {os.path.join(path, '**', '*.txt')}")
            raise ConfigError(
                f"{key}: there is no file {' nor '.join(places)}. Give an absolute path, or its folder with --data_dir=DIR or JAXMODELS_DATA_DIR."
            )
        found += files
    return list(dict.fromkeys(found))


def _in_folder(folder: str, split: str, extensions: tuple[str, ...]) -> list[str]:
    by_name = {}
    for name in NAMES[split]:
        for pattern in ("{}{}", "{}-*{}", "{}/*{}"):
            files = [file for e in extensions for file in _glob(os.path.join(glob.escape(folder), pattern.format(_any_case(name), _any_case(e))))]
            if files:
                at = len(os.path.join(folder, ""))
                by_name |= {spelt: [file for file in files if file[at:].startswith(spelt)] for spelt in {file[at : at + len(name)] for file in files}}
                break
    return _only(by_name, split, folder)


def _any_case(name: str) -> str:
    """Return a pattern of a name in any capitals."""
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in name)


def _by_pattern(pattern: str, split: str) -> list[str]:
    return _only({name: files for name in NAMES[split] if (files := _glob(pattern.replace("{split}", name)))}, split, pattern)


def _only(by_name: Mapping[str, list[str]], split: str, where: str) -> list[str]:
    if len(by_name) > 1:
        files = " and ".join(by_name[name][0] for name in sorted(by_name))
        raise ConfigError(f"config.data.source: {where} has {files}; choose one with --config.data.{split}=FILE.")
    return next(iter(by_name.values()), [])


def _glob(pattern: str) -> list[str]:
    if access.is_file(pattern):  # a name may hold characters that a pattern reads otherwise
        return [pattern]
    return access.glob(pattern)


def _nothing(path: str, places: list[str], folder: str | None, extensions: tuple[str, ...]) -> str:
    if folder is not None:
        names = access.names(folder)
        hint = config_lib.suggest("train" + extensions[0], names)
        return (
            f"config.data.source: {folder} has no train{extensions[0]}, but {', '.join(names[:8]) or 'nothing'}.{hint} "
            "Name the training file with --config.data.train=FILE."
        )
    return (
        f"config.data.source: there is no file or folder {' nor '.join(places)}. Give an absolute path, or its folder "
        "with --data_dir=DIR or JAXMODELS_DATA_DIR; {split} in a path stands for train, validation (or dev, valid, val) and test."
    )
