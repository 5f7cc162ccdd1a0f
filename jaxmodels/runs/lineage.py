"""The lineage of a run: its ancestors and descendants."""

from collections.abc import Mapping
from typing import Any

from rich.tree import Tree

from jaxmodels.data.evaluation_sets import of
from jaxmodels.pretrained.folder import is_pretrained
from jaxmodels.runs.folder import RunFolder

WORDS = ("taken", "renamed", "skipped", "initialised", "dropped")  # keys of a manifest's `parents`; see `weights.TransferReport`


def lineage(run: str) -> dict[str, Any]:
    """Return the tree of runs that contains a run, from its oldest known ancestor.

    Args:
      run: the run's folder.

    Returns:
      Nested dictionaries with `run`, `id`, `here` (whether the folder still contains that run), `model`, `task`, `source`, `parameters`,
      `trained_parameters`, the last `metrics` by split, `taken_from` (the parent's step, and the numbers of parameters that were taken,
      renamed, skipped, initialised and dropped), and `children`. Pretrained weights at the root have `run`, `id` and `model`.

    Raises:
      ConfigError: the folder contains no run.
    """
    folder = RunFolder(run)
    folder.config()
    node = _node(folder, None)
    below, entries = node, folder.manifest().get("parents", [])
    node["children"] = _children(folder, {node["id"]})
    for entry in entries:
        if is_pretrained(entry["run"]):
            below["taken_from"] = {"step": 0} | (_counts(RunFolder(below["run"]).manifest()["parents"][0]) if below["here"] else {})
            return {"run": entry["run"], "id": entry["id"], "here": True, "model": entry["model_type"], "metrics": {}, "children": [below]}
        own = RunFolder(below["run"]).manifest()["parents"][0] if below["here"] else entry  # the copy of an ancestor's entry has no counts
        parents = (RunFolder(place) for place in RunFolder(below["run"]).places(entry | {"relative": own.get("relative")}))
        parent = next((p for p in parents if p.is_run(entry.get("id"))), None)
        here = parent is not None
        above = _node(parent, None) if here else {"run": entry["run"], "id": entry.get("id"), "here": False}
        below["taken_from"] = {"step": own["step"]} | _counts(own)
        siblings = _children(parent, {above["id"], below["id"]}) if here else []
        above["children"] = [*siblings, below]
        below = above
    return below


def _node(folder: RunFolder, entry: Mapping | None) -> dict[str, Any]:
    config, manifest = folder.config(), folder.manifest()
    metrics = {}
    for line in folder.metrics():
        metrics[line.pop("split")] = line
    node = {
        "run": str(folder.path),
        "id": manifest.get("id"),
        "here": True,
        "model": config["model"]["name"],
        "task": config["task"]["name"],
        "source": config["data"]["source"],
        "parameters": manifest.get("parameters"),
        "trained_parameters": manifest.get("trained_parameters"),
        "metrics": metrics,
    }
    return node | ({"taken_from": {"step": entry["step"]} | _counts(entry)} if entry else {})


def _children(folder: RunFolder, seen: set) -> list[dict]:
    """Return the nodes of the runs initialised from this one that still exist, without those in `seen`."""
    nodes = []
    for line in folder.children():
        child = folder.find_child(line)
        if child is None or line["id"] in seen:
            continue
        seen.add(line["id"])
        node = _node(child, (child.manifest().get("parents") or [{"step": line["step"]}])[0])
        node["children"] = _children(child, seen)
        nodes.append(node)
    return nodes


def _counts(entry: Mapping) -> dict[str, int]:
    return {word: len(entry[word]) for word in WORDS if entry.get(word)}


def tree(node: Mapping[str, Any], run: str) -> Tree:
    """Return a lineage as a tree to print, with `run` marked."""
    root = Tree(_label(node, str(RunFolder(run).path)))
    _grow(root, node, run)
    return root


def _grow(branch: Tree, node: Mapping, run: str) -> None:
    for child in node.get("children", ()):
        _grow(branch.add(_label(child, str(RunFolder(run).path))), child, run)


def _label(node: Mapping, asked: str) -> str:
    parts = []
    if taken := node.get("taken_from"):
        counts = ", ".join(f"{count} {word}" for word, count in taken.items() if word != "step")
        parts.append(f"from step {taken['step']}" + (f" ({counts})" if counts else ""))
    name = f"[bold]{node['run']}[/bold] (this run)" if node["run"] == asked else node["run"]
    if not node["here"]:
        return f"{name}: missing"
    parts.append(f"{node['model']}, {node['task']} on {node['source']}" if "task" in node else f"{node['model']}, pretrained weights")
    if node.get("parameters"):
        share = "" if node["trained_parameters"] in (None, node["parameters"]) else f", {node['trained_parameters']:,} trained"
        parts.append(f"{node['parameters']:,} parameters{share}")
    splits = of(node["metrics"], "test") or of(node["metrics"], "validation")
    last = node["metrics"][splits[0]] if splits else {}
    shown = [f"{key} {value:.4g}" for key, value in last.items() if key not in ("step", "seconds") and isinstance(value, float)][:3]
    if shown:
        parts.append(f"{splits[0]} {', '.join(shown)}")
    return f"{name}: " + "; ".join(parts)
