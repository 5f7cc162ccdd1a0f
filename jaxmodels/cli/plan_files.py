"""Files of `jaxmodels plan`: the paths are checked before anything is compiled; the files are written at the end."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmodels.config import load_config, parse_override, split_spec
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.hardware import topologies
from jaxmodels.hardware.topologies import Topology
from jaxmodels.plan.compiler import DoesNotFit
from jaxmodels.plan.plan import Plan, make_plan
from jaxmodels.plan.search import SearchResult
from jaxmodels.runs.json_files import write_json
from jaxmodels.training import executable


def check(topology: str, files: Mapping[str, str | None]) -> Topology:
    """Check the command's arguments, before anything is compiled.

    Args:
      topology: its name.
      files: `json`, `hlo` and `save`: paths to write to, or None.

    Raises:
      ConfigError: the topology is unknown, or a path cannot be written.
    """
    for name, path in files.items():
        if path is not None and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise ConfigError(f"--{name}={path}: there is no folder {os.path.dirname(path)!r}.")
        if path is not None and name != "save" and os.path.isdir(path):
            raise ConfigError(f"--{name}={path} is a folder; give a file's name.")
    found = topologies.parse(topology)
    if found.chip.platform == "gpu" and files["save"]:
        raise ConfigError(
            f"--save={files['save']}: a step compiled for {topology} without a GPU is not autotuned; omit --save, and jaxmodels train compiles it on the GPUs."
        )
    return found


def plan_and_write(experiment: Experiment, topology: Topology, files: Mapping[str, str | None], found: Any = None) -> Plan:
    """Plan a run and write the files. For a step that does not fit, `json` states how much memory it needs.

    Args:
      experiment, topology: as for `make_plan`.
      files: as for `check`.
      found: the result of `plan.search`; None without a search.

    Raises:
      ConfigError, DoesNotFit, RunError: as `make_plan` does; or there is nothing to write.
    """
    # JAX can cache executables for absent devices, but not load them again (PjRt requires a client for that), and warns each time.
    jax.config.update("jax_enable_compilation_cache", False)
    extra = {"search": found.to_json()} if found is not None else {}
    try:
        plan = make_plan(experiment, topology)
    except DoesNotFit as error:
        if files["json"] and error.needed:
            page = {"topology": topology.name, "fits": False, "peak_bytes_per_device": error.needed, "device_bytes": error.available, "error": str(error)}
            write_json(Path(files["json"]), page | extra)
        raise
    if files["json"]:
        write_json(Path(files["json"]), plan.to_json() | extra)
    for name in ("hlo", "save"):
        if files[name] and (plan.step is None or name == "hlo" and plan.step.text is None):
            raise RunError(f"--{name}={files[name]}: there is no compiled step to write. {plan.notes[0]}.")
    if files["hlo"]:
        Path(files["hlo"]).write_text(plan.step.text)
    if files["save"]:
        executable.save(plan.step, files["save"], plan.to_json())
    return plan


def write_found(found: Any, path: str | None) -> None:
    """Write the best plan of a search that compiled it, as `--json` does; None writes nothing."""
    if path:
        write_json(Path(path), found.best.plan | {"search": found.to_json()})


def write_config(path: str, spec: str, overrides: Mapping[str, str], found: SearchResult) -> None:
    """Write the best setting as a config: `.py`, the original with the values that the search changed; `.json`, the whole config.

    Args:
      path: a new file.
      spec, overrides: of the original, as for `search`.
      found: its result.

    Raises:
      ConfigError: the file exists, or has another ending.
    """
    changes, best = {key: parse_override(text) for key, text in overrides.items()} | found.best.changes, found.best
    check_output(path)
    if path.endswith(".json"):
        Path(path).write_text(json.dumps(load_config(spec, changes).to_dict(), indent=2) + "\n")
        return
    file, argument = split_spec(spec)
    relative = os.path.relpath(os.path.abspath(file), os.path.dirname(os.path.abspath(path)))
    suffix = "" if argument is None else f":{argument}"
    values = "\n".join(f"    {json.dumps(key)}: {json.dumps(value) if isinstance(value, str) else repr(value)}," for key, value in changes.items())
    Path(path).write_text(f'''"""{file}{suffix} with the best setting that `jaxmodels plan --search` found on {found.topology}: {best.name}.

{1e3 * best.step_seconds:.4g} ms a step and {best.bytes / 1e9:.1f} GB a device, by {"the compiler" if best.plan else "the analytic model"}.
"""

from pathlib import Path

from jaxmodels.config import load_config

CHANGES = {{
{values}
}}


def get_config():
    return load_config(f"{{Path(__file__).parent / {relative!r}}}{suffix}", CHANGES)
''')


def check_output(path: str) -> None:
    """Raise ConfigError if `--write` cannot be written; before anything is searched."""
    if not path.endswith((".py", ".json")):
        raise ConfigError(f"--write={path}: a config is a .py or a .json file.")
    if os.path.exists(path):
        raise ConfigError(f"--write={path} exists; give another name, or delete it.")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(f"--write={path}: there is no folder {os.path.dirname(path)!r}.")
