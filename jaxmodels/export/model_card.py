"""The model card of an export: architecture, results, training, lineage and config."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.data import evaluation_sets
from jaxmodels.pretrained.architecture import Architecture
from jaxmodels.pretrained.folder import split_accepted
from jaxmodels.runs import lineage
from jaxmodels.runs.folder import RunFolder

_PIPELINES = {
    "language_model": "text-generation",
    "masked_lm": "fill-mask",
    "classify_text": "text-classification",
    "regress_text": "text-classification",
    "tag": "token-classification",
    "classify": "image-classification",
    "seq2seq": "translation",
}


def model_card(folder: RunFolder, step: int, architecture: Architecture, config_json: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Return the model card as Markdown with the Hugging Face hub's front matter.

    Args:
      folder: the run folder.
      step: the step of the weights.
      architecture: the exported architecture.
      config_json: the exported config.json.
      notes: differences between the exported model and the run.
    """
    config, manifest = folder.config(), folder.manifest()
    task = config["task"]["name"]
    front = {"library_name": "transformers", "tags": ["jaxmodels", architecture.name]}
    if task in _PIPELINES:
        front["pipeline_tag"] = _PIPELINES[task]
    base = [split_accepted(p["run"])[0].removeprefix("hf:") for p in manifest.get("parents", []) if p["run"].startswith("hf:")]
    if base and not base[0].startswith(("/", ".", "~")):
        front["base_model"] = base[0]
    sections = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()) + "\n---",
        f"# {folder.path.name}",
        f"A {architecture.name} ({config_json['architectures'][0]}) of {manifest['parameters']:,} parameters{_origin(config, manifest, step)}.",
        _use(config_json["architectures"][0], task),
        "## Results\n\n" + _results(folder, step),
        "## Training\n\n" + _training(config, manifest),
        "## Lineage\n\n" + _lineage(folder),
        "## Config\n\n```json\n" + json.dumps(config, indent=2, ensure_ascii=False, default=list) + "\n```",
    ]
    if notes:
        sections.insert(3, "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(sections) + "\n"


def _origin(config: Mapping, manifest: Mapping, step: int) -> str:
    parents = manifest.get("parents", [])
    if parents and "model_type" in parents[0] and "taken" not in parents[0]:
        return f", imported from {parents[0]['run']} and not trained since"
    return f", trained with jaxmodels: `{config['task']['name']}` on `{config['data']['source']}`, weights of step {step:,}"


def _use(name: str, task: str) -> str:
    reader = "AutoImageProcessor" if task == "classify" else "AutoTokenizer"
    return (
        f'```python\nfrom transformers import {reader}, {name}\n\nmodel = {name}.from_pretrained("FOLDER")\n'
        f'{"processor" if task == "classify" else "tokenizer"} = {reader}.from_pretrained("FOLDER")\n```'
    )


def _results(folder: RunFolder, step: int) -> str:
    rows = []
    there = dict.fromkeys(line["split"] for line in folder.metrics())
    for split in (split for main in ("test", "validation", "train") for split in evaluation_sets.of(there, main)):
        lines = [line for line in folder.metrics(split) if line["step"] <= step]
        if lines:
            rows += [f"| {split} | {key} | {value:.6g} |" for key, value in lines[-1].items() if isinstance(value, float) and not key.startswith("_")]
    if not rows:
        return "No metrics were recorded."
    return "| split | metric | value |\n|---|---|---|\n" + "\n".join(rows)


def _training(config: Mapping, manifest: Mapping) -> str:
    keys = ("data.batch_size", "training.steps", "training.epochs", "optimizer.name", "optimizer.learning_rate", "training.precision", "seed")
    flat = config_lib.flatten(config)
    lines = [f"- {key}: {flat[key]}" for key in keys if flat.get(key) is not None]
    starts = manifest.get("starts") or []
    if starts:
        lines += [f"- {name}: {version}" for name, version in starts[-1]["packages"].items()]
    return "\n".join(lines)


def _lineage(folder: RunFolder) -> str:
    lines = []
    for parent in folder.manifest().get("parents", []):
        kind = f"pretrained weights ({parent['model_type']})" if "model_type" in parent else f"step {parent['step']}"
        counts = ", ".join(f"{len(parent[word])} {word}" for word in lineage.WORDS if parent.get(word))
        lines.append(f"- from {parent['run']}, {kind}" + (f": {counts}" if counts else ""))
    return "\n".join(lines) or "Trained from random initial weights."
