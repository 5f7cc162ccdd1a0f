"""Runs that trained adapters of a run that is served too: they share its engine, and one copy of its weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.errors import ConfigError
from jaxmodels.generation.generate import own_ends
from jaxmodels.inference.adapters import with_adapters
from jaxmodels.inference.load import open_run
from jaxmodels.inference.run import Run
from jaxmodels.pretrained.folder import find, is_pretrained
from jaxmodels.runs.checkpoint import parse_run
from jaxmodels.runs.folder import RunFolder


def parents(models: Mapping[str, str]) -> dict[str, str]:
    """Return the name of each run with adapters whose parent is among the models -> the name of the parent.

    Args:
      models: name -> run.
    """
    places = {name: _place(find(run).path if is_pretrained(run) else RunFolder(parse_run(run)[0]).path) for name, run in models.items()}
    found = {}
    for name, run in models.items():
        if is_pretrained(run):
            continue
        folder = RunFolder(parse_run(run)[0])
        entries = folder.manifest().get("parents", [])
        if folder.config().get("lora") is None or not entries:
            continue
        entry = entries[0]
        wanted = {
            _place(place) for place in folder.places({"run": entry["path"] if is_pretrained(entry["run"]) else entry["run"], "relative": entry.get("relative")})
        }
        parent = next((other for other, place in places.items() if other != name and place in wanted), None)
        if parent is not None:
            found[name] = parent
    return {name: parent for name, parent in found.items() if parent not in found}  # the child of a child has weights of its own


def shared(parent: Run, children: Mapping[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """Return those runs whose adapters can be used on the weights of their parent; say why others are models of their own."""
    found = {}
    for name, run in children.items():
        try:
            with_adapters(parent, {name: run})
            _check_tokenizer(parent.tokenizer, open_run(run).info.get("tokenizer"))
            found[name] = run
        except ConfigError as error:
            say(f"{name} is a model of its own: {error}")
    return found


def _check_tokenizer(parent: Any, child: Any) -> None:
    """Raise ConfigError unless two tokenizers have the same tokens and ends: the engine has those of the parent. Chat templates may differ."""
    one, other = (None if tokenizer is None else tokenizer.to_json() for tokenizer in (parent, child))
    same = one == other or (hasattr(parent, "has_tokens_of") and hasattr(child, "files") and parent.has_tokens_of(child.files()))
    if not same or own_ends(parent) != own_ends(child):
        raise ConfigError("its tokenizer has other tokens, or other tokens that end a text, than that of its parent.")


def _place(path: Any) -> Any:
    return path.resolve() if isinstance(path, Path) else path
