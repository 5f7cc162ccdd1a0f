"""Going back to an older checkpoint: what came after it is moved to `set_aside/`, never deleted.

`set_aside/1` is a run folder itself: it has the later checkpoints, and copies of the config, the manifest and the lines of metrics as they were.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.data.evaluation_sets import main_of
from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError
from jaxmodels.runs import bucket_store, disk
from jaxmodels.runs.folder import RunFolder, now
from jaxmodels.runs.json_files import append_line
from jaxmodels.storage.paths import BucketPath, is_bucket


def saved_steps(folder: RunFolder) -> list[int]:
    """Return the steps of the checkpoints in a run folder, in ascending order. Starts no device, as Orbax would."""
    if is_bucket(folder.path):
        return bucket_store.saved_steps(folder.checkpoints)
    return sorted(int(path.name) for path in folder.checkpoints.glob("*") if path.name.isdigit())


def check(folder: RunFolder, step: int) -> None:
    """Check that a run can go back to a step.

    Raises:
      ConfigError: it has no checkpoint of that step; or another run needs a later checkpoint at its place.
    """
    steps = saved_steps(folder)
    if step not in steps:
        there_are = f"it has steps {', '.join(map(str, steps))}" if steps else "it has none yet"
        raise ConfigError(f"--from_step={step}: {folder.path} has no checkpoint of that step; {there_are}.")
    for line in folder.children():
        if line["needed"] and line["step"] > step and (child := folder.find_child(line)) is not None:
            raise ConfigError(
                f"--from_step={step}: the frozen weights of {child.path} are in the checkpoint of step {line['step']}, which would be moved. "
                "Merge that run first (jaxmodels merge), or start a new run from this step with config.init_from."
            )


def last_going_back(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the last entry of the manifest's list `went_back`; None if there is none."""
    return next(iter(manifest.get("went_back", [])[-1:]), None)


def go_back(folder: RunFolder, step: int) -> str:
    """Set aside what came after a step, in the first process, and record it in the manifest; return a line that says so.

    If the process is killed in between, the same call sets aside the rest.
    """
    line = ""
    with session.first_goes_first("go back"):
        if session.is_first():
            with disk.must_write(folder.path):
                line = _go_back(folder, step)
    return line


def _go_back(folder: RunFolder, step: int) -> str:
    later = [saved for saved in saved_steps(folder) if saved > step]
    entry: dict[str, Any] = {"time": now(), "from_step": step, "moved": later}
    line = f"going back to step {step}: there are no later checkpoints"
    if later:
        place = _new_folder(folder)
        # Copies first, so that the place is a run folder whenever it holds a checkpoint.
        for file in (folder.config_file, folder.manifest_file, folder.metrics_file, folder.samples_file, folder.tokenizer_file):
            if file.is_file():
                (place / file.name).write_bytes(file.read_bytes())
        for path in later_media(folder, step):
            (place / "media").mkdir(exist_ok=True)
            _move(path, place / "media" / path.name)
        (place / "checkpoints").mkdir()
        for saved in reversed(later):  # what is left after a kill ends with a checkpoint that knows of all before it
            _move(folder.checkpoints / str(saved), place / "checkpoints" / str(saved))
        entry["to"] = f"set_aside/{place.name}"
        steps = ", ".join(map(str, later))
        line = f"going back to step {step}: the checkpoint{'s' if len(later) > 1 else ''} of step {steps} and the lines of metrics are in {place}"
    manifest = folder.manifest()
    if later or (last_going_back(manifest) or {}).get("from_step") != step:
        folder.update_manifest(went_back=[*manifest.get("went_back", []), entry])
    return line


def later_media(folder: RunFolder, step: int) -> list[Path | BucketPath]:
    """Return the files in `media/` of later steps: NAME_STEP.png and .wav."""
    found = [(path, re.search(r"_(\d+)\.(png|wav)$", path.name)) for path in (folder.path / "media").glob("*")]
    return [path for path, match in found if match and int(match[1]) > step]


def set_tests_aside(folder: RunFolder) -> str | None:
    """Keep the lines of the test in `set_aside/tests.jsonl`, before a finished run goes on and is tested again; return that file if there are any."""
    lines = [line for line in folder.metrics() if main_of(line["split"]) == "test"]
    if not lines:
        return None
    file = folder.path / "set_aside" / "tests.jsonl"
    file.parent.mkdir(exist_ok=True)
    there = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for text in (folder.metrics_line(line).rstrip("\n") for line in lines):
        if text not in there:
            append_line(file, text)
    return str(file)


def describe(manifest: Mapping[str, Any]) -> list[str]:
    """Return one line for each change of a run's config and each time that it went back, in the order of their times."""
    lines = []
    for entry in manifest.get("went_back", []):  # before the changes of the same second
        moved = f"; later checkpoints are in {entry['to']}" if entry.get("to") else ""
        lines.append((entry.get("time", ""), f"went back to step {entry['from_step']}{moved}"))
    for entry in manifest.get("changes", []):
        note = f"; {entry['note']}" if entry.get("note") else ""
        lines.append((entry.get("time", ""), f"from step {entry['step']}  {entry['key']}: {_shown(entry['old'])} → {_shown(entry['new'])}{note}"))
    return [f"{time}  {line}" for time, line in sorted(lines, key=lambda pair: pair[0])]


def _shown(value: Any) -> str:
    return value if value == "(absent)" else json.dumps(value, ensure_ascii=False)


def _new_folder(folder: RunFolder) -> Path | BucketPath:
    """Create and return a new folder in `set_aside/`."""
    place = folder.path / "set_aside"
    place.mkdir(exist_ok=True)
    number = max([int(path.name) for path in place.iterdir() if path.name.isdigit()], default=0) + 1
    (place / str(number)).mkdir()
    return place / str(number)


def _move(path: Path | BucketPath, to: Path | BucketPath) -> None:
    """Move a file or a checkpoint's folder; of a symbolic link, move the link, and let it point to the same place."""
    if isinstance(path, BucketPath):
        if path.is_file():
            to.write_bytes(path.read_bytes())
            path.unlink()
        else:
            bucket_store.move(path, to)
    elif path.is_symlink():
        to.symlink_to(os.path.realpath(path))
        path.unlink()
    else:
        path.rename(to)
