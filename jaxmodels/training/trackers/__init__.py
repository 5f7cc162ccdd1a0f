"""Trackers: callbacks that write metrics and media somewhere.

A config lists them, by name or as a dict of a name and keys:

    log.trackers = ("jsonl", "tensorboard", {"name": "wandb", "project": "digits"}, "my_project.hooks:Slack")

A tracker's keys are the keyword-only parameters of its class. It overrides `on_start`, `on_log`, `on_evaluate`, `on_media`, `on_save` and
`on_end` of `Callback` as needed and must not change the values that it is given. By default its methods run in a separate thread
(see `background.Background`); a class with `background = False` runs in the training loop. An exception turns the tracker off, never the run.
A tracker that has not finished at the time limit is left behind; its method `abandon`, if any, ends what would keep the process from exiting.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError
from jaxmodels.training.callback import Callback
from jaxmodels.training.trackers.background import Background, Group
from jaxmodels.training.trackers.jsonl import MediaFiles

_HERE = "jaxmodels.training.trackers"
TRACKERS = {
    "jsonl": f"{_HERE}.jsonl:JsonLines",
    "tensorboard": f"{_HERE}.tensorboard:TensorBoard",
    "csv": f"{_HERE}.csv:Csv",
    "wandb": f"{_HERE}.wandb:Wandb",
    "mlflow": f"{_HERE}.mlflow:Mlflow",
}
DEFAULT = ("jsonl", "tensorboard")


def make_trackers(entries: Sequence[str | Mapping[str, Any]]) -> list[Callback]:
    """Construct the trackers of `log.trackers`. Starts no thread and writes nothing: that is for `on_start`.

    Args:
      entries: names, of `TRACKERS` or `package.module:Class`, or dicts of a `name` and keys.

    Returns:
      Callbacks in the order of the entries. `jsonl` gives two: metrics, and media files.

    Raises:
      ConfigError: an unknown name or key, a wrong type, a name listed twice, no `jsonl`, or a package that is not installed.
    """
    group, trackers, seen = Group(), [], set()
    for index, entry in enumerate(entries):
        where = f"log.trackers[{index}]"
        name, keys = _split(where, entry)
        if name in seen:
            raise ConfigError(f"config.{where}: {name!r} is listed twice; list it once.")
        if name in TRACKERS:
            seen.add(name)
        tracker = _make(where, name, keys)
        trackers.append(Background(name, tracker, group) if getattr(tracker, "background", True) else tracker)
        if name == "jsonl":
            trackers.append(MediaFiles())
    if "jsonl" not in seen:
        raise ConfigError("config.log.trackers must include 'jsonl': a run that resumes reads its earlier metrics from metrics.jsonl.")
    return trackers


def _split(where: str, entry: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the keys of an entry."""
    values = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ConfigError(f"config.{where} must be a name, or a dict with a 'name' and keys of that tracker; got {entry!r}.")
    return values["name"], {key: value for key, value in values.items() if key != "name"}


def _make(where: str, name: str, keys: Mapping[str, Any]) -> Any:
    """Construct one tracker from its checked keys."""
    if name not in TRACKERS and ":" not in name:
        hint = config_lib.suggest(name, TRACKERS)
        raise ConfigError(f"config.{where}: there is no tracker {name!r}.{hint} There are: {', '.join(TRACKERS)}; or 'package.module:Class'.")
    constructor = config_lib.find(where, TRACKERS, name)
    if not inspect.isclass(constructor):
        raise ConfigError(f"config.{where}: {name!r} is not a class.")
    tracker = constructor(**config_lib.check_section(where, keys, config_lib.fields(constructor), f"tracker {name!r}"))
    tracker.on_error = "continue"  # overrides the class: an outage of a tracker never ends a run
    return tracker
