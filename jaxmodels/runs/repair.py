"""Repair of a run folder's own files before a run resumes: what is damaged is set aside in `damaged/`, and what is valid stays in use."""

from pathlib import Path

from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.json_files import replace
from jaxmodels.storage.paths import BucketPath


def repair(folder: RunFolder) -> list[str]:
    """Set aside damaged lines of `metrics.jsonl` and a damaged `manifest.json`; return one warning for each file.

    The manifest keeps its valid entries. Its id, by which children know the run, is taken from a child if it is lost.
    """
    return [*_repair_metrics(folder), *_repair_manifest(folder)]


def _repair_metrics(folder: RunFolder) -> list[str]:
    damaged = folder.damaged_metrics()
    if not damaged:
        return []
    aside = _aside(folder, folder.metrics_file)
    aside.write_bytes(b"".join(line + b"\n" for line in damaged.values()))
    lines = folder.metrics()
    replace(folder.metrics_file, "".join(map(folder.metrics_line, lines)))
    numbers = ", ".join(map(str, list(damaged)[:5])) + (", …" if len(damaged) > 5 else "")
    which = f"line {numbers} is" if len(damaged) == 1 else f"{len(damaged)} lines ({numbers}) are"
    return [f"{folder.metrics_file}: {which} damaged and moved to {aside}; the other {len(lines)} are in use"]


def _repair_manifest(folder: RunFolder) -> list[str]:
    lost = folder.damaged_manifest()
    if not lost:
        return []
    aside = _aside(folder, folder.manifest_file)
    values = folder.manifest()
    if "id" not in values and (run_id := _id_in_children(folder)) is not None:
        values["id"] = run_id
    # A copy first: a process that is killed in between leaves both.
    aside.write_bytes(folder.manifest_file.read_bytes())
    folder.manifest_file.unlink()
    folder.update_manifest(**values)
    return [f"{folder.manifest_file} was damaged: {lost}. It was copied to {aside}, and a new one is written"]


def _aside(folder: RunFolder, file: Path | BucketPath) -> Path | BucketPath:
    """Return a new path in `damaged/` for the contents of a file."""
    place = folder.path / "damaged"
    place.mkdir(exist_ok=True)
    number = 1
    while (path := place / f"{file.stem}-{number}{file.suffix}").exists():
        number += 1
    return path


def _id_in_children(folder: RunFolder) -> str | None:
    """Return the id of this run that the manifest of a child holds; None if there is no such child."""
    for line in folder.children():
        child = folder.find_child(line)
        for entry in child.manifest().get("parents", [])[:1] if child is not None else ():
            if folder.path in child.places({"relative": "."} | entry) and isinstance(entry.get("id"), str):
                return entry["id"]
    return None
