"""A run folder: its config, manifest, metrics and children.

config.json     the resolved config
manifest.json   versions, devices, parents, fallbacks, one entry per start
metrics.jsonl   one JSON object per line
children.jsonl  runs initialised from this one
lock.json       the process that trains here, while it does; see `runs.lock`
samples.txt     generated text
tokenizer.json  of a text run
checkpoints/    Orbax, one folder per step
tensorboard/    event files
media/          images, figures and audio
damaged/        damaged lines and files, set aside by `runs.repair`
set_aside/      what came after a step that the run went back to, by `runs.going_back`
metrics.csv, wandb/, mlruns/    of the trackers csv, wandb and mlflow
"""

import datetime
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.data.evaluation_sets import main_of
from jaxmodels.errors import ConfigError
from jaxmodels.runs.json_files import append_line, append_text, read_json, read_lines, replace, write_json
from jaxmodels.storage import paths
from jaxmodels.storage.paths import BucketPath, StorageError

MOST_ENTRIES = 50  # of a list in the manifest
_NOT_FINITE = ("nan", "inf", "-inf")
_TRACKERS = ("tensorboard", "metrics.csv", "media", "wandb", "mlruns")
OURS = ("config.json", "manifest.json", "metrics.jsonl", "children.jsonl", "samples.txt", "tokenizer.json", "checkpoints", "damaged", "set_aside", *_TRACKERS)


class RunFolder:
    """The folder of one run, on a disk or in a bucket. The constructor reads and writes nothing.

    Attributes:
      path: of the folder, absolute.
      …_file, tensorboard, checkpoints: paths in it.
    """

    def __init__(self, path: str | os.PathLike | BucketPath):
        """
        Raises:
          ConfigError: the address is of no kind that is known; or the absolute path is not valid UTF-8, which manifests and the libraries that write
            arrays need.
        """
        self.path = paths.parse(path).absolute()
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            shown = os.fsencode(self.path).decode(errors="backslashreplace")
            raise ConfigError(f"the path of the run folder, {shown}, is not valid UTF-8. Choose another --workdir, or rename that folder.") from None
        self.config_file = self.path / "config.json"
        self.manifest_file = self.path / "manifest.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.children_file = self.path / "children.jsonl"
        self.samples_file = self.path / "samples.txt"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.lock_file = self.path / "lock.json"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"

    def config(self) -> dict:
        """Return the resolved config of the run.

        Raises:
          ConfigError: the folder contains no run.
        """
        if not self.config_file.is_file():
            hint = "" if self.path.is_dir() else " (there is no such folder)"
            raise ConfigError(f"{self.path} is not the folder of a run: it has no config.json{hint}.")
        config = read_json(self.config_file)
        if not isinstance(config, dict):
            raise ConfigError(f"{self.config_file} does not contain a config.")
        return config

    def stored_config(self) -> dict | None:
        """Return the config of the run in this folder; None if there is no run.

        Raises:
          ConfigError: the folder has files of a run, but no config.
        """
        if self.config_file.is_file():
            return self.config()
        taken = [name for name in OURS if (self.path / name).exists()]
        if taken:
            raise ConfigError(f"{self.path} has {', '.join(taken)} but no config.json, so it cannot be resumed. Choose another --workdir.")
        return None

    def check_writable(self) -> None:
        """Raise ConfigError if the folder cannot be created or written."""
        if isinstance(self.path, BucketPath):
            paths.check_writable(self.path, "--workdir")
            return
        for last in (False, False, True):
            place = self.path
            try:
                while not place.exists() and not place.is_symlink():
                    place = place.parent
                if not place.is_dir():
                    raise ConfigError(f"--workdir={self.path}: {place} is not a folder.")
                tempfile.TemporaryFile(dir=place).close()
                return
            except OSError as error:
                if isinstance(error, FileNotFoundError) and not last and not place.is_symlink():
                    continue  # another start, which was refused, has deleted its empty folder in between
                raise ConfigError(f"--workdir={self.path}: {place} cannot be written ({error.strerror}). Choose another folder.") from error

    def clear(self) -> None:
        """Delete the files of the run, and no other file in the folder."""
        for name in OURS:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                paths.delete_tree(path)
            elif path.exists():
                path.unlink()

    def write_config(self, config: Mapping) -> None:
        """Create the folder and write `config.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config_file, config)

    # The manifest

    def manifest(self) -> dict:
        """Return the manifest without damaged entries; empty if there is none, or if it cannot be read."""
        return self._read_manifest()[0]

    def damaged_manifest(self) -> str | None:
        """Return what is damaged in the manifest; None if it is missing or whole."""
        return self._read_manifest()[1]

    def _read_manifest(self) -> tuple[dict, str | None]:
        if not self.manifest_file.is_file():
            return {}, None
        try:
            values = read_json(self.manifest_file)
        except ConfigError:
            return {}, "it is no JSON"
        if not isinstance(values, dict):
            return {}, "it holds no JSON object"
        bad = [key for key, is_valid in _MANIFEST.items() if key in values and not is_valid(values[key])]
        return {key: value for key, value in values.items() if key not in bad}, f"its {', '.join(bad)} cannot be used" if bad else None

    def update_manifest(self, **values) -> None:
        """Set top-level keys of the manifest."""
        write_json(self.manifest_file, self.manifest() | values)

    def add_to_manifest(self, key: str, value: Any) -> None:
        """Append to a list of the manifest, unless it has an equal entry; see `shortened`."""
        manifest = self.manifest()
        entries = manifest.get(key, [])
        if value not in entries:
            self.update_manifest(**shortened(manifest, key, [*entries, value]))

    def identify(self) -> str:
        """Return the run's id, by which children identify it; create it at the first call."""
        if "id" not in self.manifest():
            self.update_manifest(id=uuid.uuid4().hex)
        return self.manifest()["id"]

    # Children

    def add_child(self, child: Mapping[str, Any]) -> None:
        """Append to `children.jsonl`: `run`, `id`, the `step` it was initialised from, and `needed`, whether it reads weights from this run."""
        if child not in self.children():
            append_line(self.children_file, json.dumps(dict(child)))

    def children(self) -> list[dict]:
        """Return the lines of `children.jsonl`, without damaged ones."""
        return read_lines(self.children_file, _is_child)[0]

    def find_child(self, line: Mapping[str, Any]) -> "RunFolder | None":
        """Return the run of a line of `children.jsonl`, at its absolute or relative path; None if it is at neither."""
        found = (RunFolder(place) for place in self.places(line))
        return next((f for f in found if f.is_run(line["id"])), None)

    def is_run(self, run_id: str | None) -> bool:
        """Return whether the run with this id is here; False also for a bucket that cannot be reached."""
        try:
            return self.config_file.is_file() and self.manifest().get("id") == run_id
        except StorageError:
            return False

    def places(self, entry: Mapping[str, Any]) -> list[Path | BucketPath]:
        """Return where the run of an entry of `children.jsonl` or of the manifest's `parents` may be: at its address, or beside this run if both moved."""
        places = [paths.parse(entry["run"])] + ([self.path / entry["relative"]] if entry.get("relative") else [])
        return [Path(os.path.normpath(place)) if isinstance(place, Path) else place for place in places]

    def dependents(self) -> list[Path | BucketPath]:
        """Return the folders of existing runs that read weights from this run."""
        return [child.path for line in self.children() if line["needed"] and (child := self.find_child(line))]

    # Metrics

    def metrics(self, split: str | None = None) -> list[dict]:
        """Return the lines of `metrics.jsonl`, of one split if given, without damaged ones. Those of further sets have the splits `validation/NAME` and `test/NAME`."""
        return [
            {key: float(value) if value in _NOT_FINITE else value for key, value in line.items()}
            for line in read_lines(self.metrics_file, _is_metrics)[0]
            if split in (None, line["split"])
        ]

    def damaged_metrics(self) -> dict[int, bytes]:
        """Return the damaged lines of `metrics.jsonl`, by number; not a truncated last line."""
        return read_lines(self.metrics_file, _is_metrics)[1]

    def add_metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append a line to `metrics.jsonl`; on an OSError, no part of it."""
        append_line(self.metrics_file, self.metrics_line({"step": step, "split": split} | dict(values)).rstrip("\n"))

    def add_lines(self, lines: Sequence[tuple[int, str, Mapping[str, float]]]) -> None:
        """Append lines of (step, split, values) to `metrics.jsonl` together."""
        append_text(self.metrics_file, "".join(self.metrics_line({"step": step, "split": split} | dict(values)) for step, split, values in lines))

    def rewind(self, step: int, evaluated_at: int, finished: bool) -> None:
        """Drop the lines and samples that a run resumed from `step` will write again.

        Args:
          step: of the checkpoint.
          evaluated_at: the last step whose evaluation that checkpoint knows of.
          finished: whether training ended there; the test, whose line may carry an earlier step, comes after.
        """
        until = {"validation": evaluated_at, "test": step if finished else -1}
        remaining = [line for line in self.metrics() if line["step"] <= until.get(main_of(line["split"]), step)]
        if self.metrics_file.is_file():
            replace(self.metrics_file, "".join(map(self.metrics_line, remaining)))
        if self.samples_file.is_file():
            text = self.samples_file.read_text(encoding="utf-8", errors="replace")
            samples = re.finditer(r"(?ms)^--- step (\d+) ---$.*?(?=^--- step \d+ ---$|\Z)", text)
            replace(self.samples_file, "".join(sample[0] for sample in samples if int(sample[1]) <= evaluated_at))

    @staticmethod
    def metrics_line(line: Mapping) -> str:
        """Return a line of `metrics.jsonl`; numbers that are not finite become strings, since JSON cannot represent them."""
        odd = {key: str(value) for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        return json.dumps(dict(line) | odd) + "\n"


def _is_metrics(line: Mapping) -> bool:
    """Return whether an object is a line of `metrics.jsonl`: a step, a split, and numbers."""
    values = (value for key, value in line.items() if key not in ("step", "split"))
    whole = isinstance(line.get("step"), int) and isinstance(line.get("split"), str)
    return whole and all(isinstance(value, (int, float)) or value in _NOT_FINITE for value in values)


def _is_child(line: Mapping) -> bool:
    """Return whether an object is a line of `children.jsonl`."""
    return isinstance(line.get("run"), str) and isinstance(line.get("step"), int) and {"id", "needed"} <= line.keys()


def shortened(manifest: Mapping, key: str, entries: list) -> dict[str, Any]:
    """Return a list as keys of a manifest: the first and the latest entries, and the number of those that were left out in between.

    So a run that is stopped a thousand times does not write a thousand entries at each start.
    """
    left_out = max(0, len(entries) - MOST_ENTRIES)
    before = manifest.get(f"{key}_left_out", 0)
    kept = [*entries[:1], *entries[1 + left_out :]]
    return {key: kept} | ({f"{key}_left_out": before + left_out} if before + left_out else {})


# The keys of a manifest that the package reads back, and whether a value is one.
_is_list = lambda value: isinstance(value, list)
_is_object = lambda value: isinstance(value, dict)
_MANIFEST = {
    "id": lambda value: isinstance(value, str),
    "info": _is_object,
    "data": _is_object,
    "fallbacks": _is_list,
    "guesses": _is_list,
    "starts_left_out": lambda value: isinstance(value, int),
    "fallbacks_left_out": lambda value: isinstance(value, int),
    "starts": lambda value: _is_list(value) and all(map(_is_object, value)),
    "changes": lambda value: _is_list(value) and all(_is_object(entry) and {"step", "key", "old", "new"} <= entry.keys() for entry in value),
    "went_back": lambda value: _is_list(value) and all(_is_object(entry) and "from_step" in entry for entry in value),
    "parents": lambda value: _is_list(value) and all(_is_object(entry) and isinstance(entry.get("run"), str) and "step" in entry for entry in value),
}


def now() -> str:
    """Return the current time for manifests: ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
