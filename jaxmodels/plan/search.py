"""`jaxmodels plan --search`: which mesh, accumulation and rematerialisation make a config's step fastest on a topology.

Three sieves, each finer and slower than the one before:

1. Shapes: meshes that divide nothing, or whose share of the state alone fills a device, are never looked at (`plan.candidates`).
2. Models: the step is traced for a mesh; `plan.memory` says whether it fits, `plan.roofline` how long it takes. Seconds each.
3. The compiler: the promising ones, and the config's own setting before them, go through `jaxmodels plan`, in processes of their own.

All settings compute the same loss from the same global batch.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import jaxmodels
from jaxmodels.config import load_config, parse_override, split_spec
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.plan import candidates as candidates_lib
from jaxmodels.plan import gpu, memory, roofline
from jaxmodels.plan import topology as topology_lib
from jaxmodels.plan.candidates import Changes, changed, mesh_changes
from jaxmodels.training.compile import cache_folder

# The memory model is within a tenth of the compiler (tests/plan/test_memory_model.py): what is further above than that is not compiled.
MARGIN = 1.1
# The share of the budget in which settings are modelled; the compiler has the rest.
MODEL_SHARE = 0.3
# Meshes that are modelled, those whose variants are, settings that are compiled, and of these with the same mesh, at most.
MESHES, VARIED, COMPILED, SAME = 40, 5, 16, 5
# Lines of the table, besides what was compiled.
SHOWN = 20
# Memory of the host that one compilation of a large step needs, in bytes (benchmarks/memory_model.py prints it).
COMPILER_MEMORY = 8e9


@dataclasses.dataclass
class Setting:
    """One candidate, and what is known of it.

    Attributes:
      changes: dotted keys of the config with their values; all that makes it differ from others.
      own: it is the config as it was given.
      state: `compiled`, `modelled` (never compiled), `too large`, `failed` or `out of time`.
      memory, seconds: by the models: bytes on a device, and of a step; None where it was not modelled.
      parts: seconds by part, of the compiler where it was compiled, else of the model.
      plan: what `jaxmodels plan --json` says of it; None where it was not compiled.
      why: why it is not the first.
    """

    changes: Changes
    own: bool = False
    state: str = "modelled"
    memory: int | None = None
    seconds: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    plan: dict | None = None
    why: str = ""

    @property
    def name(self) -> str:
        return candidates_lib.shown(tuple(self.changes.items()))

    @property
    def step_seconds(self) -> float:
        """Of the compiler's estimate, else of the model's."""
        return self.plan["step_seconds"] if self.plan else math.inf if self.seconds is None else self.seconds

    @property
    def bytes(self) -> int:
        return self.plan["peak_bytes_per_device"] if self.plan else self.memory or 0


@dataclasses.dataclass
class Found:
    """What a search found.

    Attributes:
      topology: its name.
      settings: the best one first.
      notes: what was left out, and what the ranking goes by.
      seconds: that it took.
      cached: it was found before, by the same question.
    """

    topology: str
    settings: list[Setting]
    notes: list[str]
    seconds: float
    cached: bool = False

    @property
    def best(self) -> Setting:
        return self.settings[0]

    def to_json(self) -> dict:
        return {
            "topology": self.topology,
            "seconds": self.seconds,
            "cached": self.cached,
            "notes": self.notes,
            "settings": [{"setting": each.name, "own": each.own, **dataclasses.asdict(each)} for each in self.settings],
        }


# (changes of a setting, seconds it may take) -> what `jaxmodels plan --json` wrote, or None and why there is nothing.
Runner = Callable[[Changes, float], tuple[dict | None, str]]


def search(spec: str, overrides: Mapping[str, str], topology: str, *, budget: float = 900.0, data_dir: str | None = None) -> Found:
    """Searches the settings of a config on a topology; what was found before by the same versions is given again.

    Args:
      spec: of the config, as `--config` takes it.
      overrides: dotted keys to the text of their values, as the command line has them.
      topology: its name.
      budget: seconds that it may take.
      data_dir: the data directory.

    Raises:
      ConfigError: the config or the topology is wrong; or nothing fits, with the nearest.
    """
    config = load_config(spec, {key: parse_override(text) for key, text in overrides.items()})
    experiment = build_experiment(config, data_dir=data_dir)
    place = topology_lib.parse(topology)
    folder = cache_folder().parent / "search" / _key(experiment, topology)
    kept = folder / "found.json"
    if (found := _read(kept)) is not None and found["budget"] >= budget:
        return Found(topology, [_setting(each) for each in found["settings"]], found["notes"], found["seconds"], cached=True)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [f"--config={spec}", *(f"--config.{key}={text}" for key, text in overrides.items()), *([f"--data_dir={data_dir}"] if data_dir else [])]
    runner = _remembered(folder, plan_in_process(arguments, topology, folder)) if compiles(place) else None
    result = find(experiment, place, budget=budget, run=runner, workers=workers())
    _write(kept, {"budget": budget, **result.to_json()})
    return result


def compiles(topology: Any) -> bool:
    """Whether there is a compiler for a topology here."""
    return topology_lib.has_libtpu() if topology.chip.platform == "tpu" else gpu.has_compiler()


def workers() -> int:
    """Compilations at a time: as many as there are cores, and room for them in memory."""
    free = next((int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")), COMPILER_MEMORY)
    return max(1, min(len(os.sched_getaffinity(0)), int(free // COMPILER_MEMORY)))


def find(experiment: Experiment, topology: Any, *, budget: float, run: Runner | None, workers: int) -> Found:
    """The search itself.

    Args:
      experiment: as `build_experiment` gives.
      topology: as `plan.topology.parse` gives.
      budget: seconds that it may take.
      run: compiles a setting; None where there is no compiler, and the models decide alone.
      workers: settings that are compiled at a time.
    """
    started = time.monotonic()
    modelled, notes = model_settings(experiment, topology, started + budget * (MODEL_SHARE if run else 1.0))
    if run is None:
        notes.append(f"there is no compiler for {topology.name} here: ranked by the analytic models of memory and time alone")
    else:
        _compile(modelled, run, workers, started + budget, notes)
    settings = rank(modelled, topology.chip.memory_per_device)
    return Found(topology.name, settings, notes, time.monotonic() - started)


# The models


def model_settings(experiment: Experiment, topology: Any, until: float) -> tuple[list[Setting], list[str]]:
    """Settings with what the models say of each; and notes.

    Meshes are tried first, with the least that each keeps in memory; then of the fastest ones every policy and accumulation.

    Args:
      experiment: as `build_experiment` gives.
      topology: as `plan.topology.parse` gives.
      until: the time (`time.monotonic`) to end at.
    """
    room, notes, settings, late = topology.chip.memory_per_device, [], [], 0
    try:
        settings.append(Setting(_own_changes(experiment, topology), own=True))
        _model(settings[0], experiment, topology)
    except ConfigError as error:  # often a mesh for another number of devices
        settings.clear()
        notes.append(f"the config's own setting is not among these: {error}")
    meshes = candidates_lib.meshes(experiment, topology)
    fitting = [mesh for mesh, state in meshes if state < room]
    if len(fitting) < len(meshes):
        notes.append(f"{len(meshes) - len(fitting)} of {len(meshes)} meshes left out: a device's share of the state alone is more than its {room / 1e9:.1f} GB")
    if len(fitting) > MESHES:
        notes.append(f"{len(fitting) - MESHES} meshes that cut the model further were not looked at")
    least = candidates_lib.lightest(experiment)
    for mesh in fitting[:MESHES]:
        allowed = candidates_lib.accumulations(experiment, mesh)
        at = experiment.training.accumulate if experiment.training.accumulate in allowed else allowed[-1]
        changes = mesh_changes(mesh) | candidates_lib.context_changes(experiment, mesh) | {"training.accumulate": at} | least
        late += not _add(settings, changes, experiment, topology, until)
    ranked = sorted((each for each in settings if each.state == "modelled"), key=lambda each: (each.memory > room * MARGIN, each.seconds))
    for base in ranked[:VARIED]:
        mesh = {key.removeprefix("mesh."): value for key, value in base.changes.items() if key.startswith("mesh.")}
        traced = roofline.trace(changed(experiment, base.changes | least), topology.devices, topology.chip)
        for policy in candidates_lib.policies(experiment, traced):
            for count in candidates_lib.accumulations(experiment, mesh):
                if _worth_a_look(policy, count, base, settings, room):
                    late += not _add(settings, base.changes | policy | {"training.accumulate": count}, experiment, topology, until)
    if late:
        notes.append(f"{late} settings were not looked at: the time for the models was over (a larger --budget has room for them)")
    return settings, notes


def _own_changes(experiment: Experiment, topology: Any) -> Changes:
    """The setting that a config has, in the form of a candidate."""
    sizes = dataclasses.replace(experiment.mesh, slices=max(experiment.mesh.slices, topology.slices))
    mesh = memory.planned_mesh(sizes, topology.devices, topology.chip.platform).shape
    model = experiment.config["model"]
    keys = {f"model.{key}": model[key] for key in ("remat", "offload") if key in model}
    return mesh_changes(mesh) | {"training.accumulate": experiment.training.accumulate} | keys


def _worth_a_look(policy: Changes, count: int, base: Setting, settings: Sequence[Setting], room: int) -> bool:
    """Whether a variant may be better than those of its mesh that are known to fit: it is not, where it does more of what costs time."""
    same = [
        each
        for each in settings
        if each.state == "modelled" and each.memory <= room and all(each.changes[k] == v for k, v in base.changes.items() if k.startswith("mesh."))
    ]
    offload = bool(policy.get("model.offload"))
    # More parts only cost time where fewer fit with the same policy; what goes to the host's memory, where it fits on the device.
    fewer = [each for each in same if each.changes.get("model.remat") == policy.get("model.remat") and each.changes["training.accumulate"] < count]
    here = [each for each in same if each.changes.get("model.remat") == policy.get("model.remat") and not each.changes.get("model.offload")]
    return not fewer and not (offload and here)


def _add(settings: list[Setting], changes: Changes, experiment: Experiment, topology: Any, until: float) -> bool:
    """Models a setting that is not there yet. Returns False if it is too late for that."""
    if any(each.changes == changes for each in settings):
        return True
    if time.monotonic() > until:
        return False
    setting = Setting(changes)
    try:
        _model(setting, experiment, topology)
    except ConfigError as error:
        setting.state, setting.why = "failed", str(error)
    settings.append(setting)
    return True


def _model(setting: Setting, experiment: Experiment, topology: Any) -> None:
    other = changed(experiment, setting.changes)
    traced = roofline.trace(other, topology.devices, topology.chip)
    setting.memory = memory.peak(traced).total
    setting.seconds, setting.parts = roofline.traced_roofline(other, traced, topology)
    if setting.memory > topology.chip.memory_per_device * MARGIN:
        over = setting.memory - topology.chip.memory_per_device
        setting.state, setting.why = "too large", f"does not fit by {over / 1e9:.1f} GB, says the model"


# The compiler


def _compile(settings: list[Setting], run: Runner, workers: int, until: float, notes: list[str]) -> None:
    """Compiles the config's own setting and then the promising ones, the fastest first, until the time is over."""
    waiting, longest, left = promising(settings), 0.0, 0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running: dict[concurrent.futures.Future, tuple[Setting, float]] = {}
        while waiting or running:
            # One that would not be done in time is not begun.
            while waiting and len(running) < workers and time.monotonic() + longest < until:
                setting = waiting.pop(0)
                running[pool.submit(run, setting.changes, until - time.monotonic())] = (setting, time.monotonic())
            if not running:
                left = len(waiting)
                break
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                setting, began = running.pop(future)
                longest = max(longest, time.monotonic() - began)
                _take(setting, *future.result())
    if left:
        notes.append(f"{left} promising settings were not compiled: the time was over (a larger --budget has room for them)")


def promising(settings: Sequence[Setting]) -> list[Setting]:
    """Those to compile: the config's own, then the fastest that fit, by the models; of a mesh SAME at most, since what differs in
    rematerialisation alone is more alike than the models are exact."""
    chosen, of_mesh = [], collections.Counter()
    for each in sorted((each for each in settings if each.state == "modelled" and not each.own), key=lambda each: each.seconds):
        mesh = tuple(value for key, value in each.changes.items() if key.startswith("mesh."))
        of_mesh[mesh] += 1
        if of_mesh[mesh] <= SAME:
            chosen.append(each)
    return [*(each for each in settings if each.own), *chosen[: COMPILED - 1]]


def _take(setting: Setting, plan: dict | None, problem: str) -> None:
    """What the compiler said of a setting."""
    if plan is not None and not plan["fits"]:
        over = plan["peak_bytes_per_device"] - plan["device_bytes"]
        setting.state, setting.why = "too large", f"does not fit by {over / 1e9:.1f} GB, says the compiler"
    elif plan is not None:
        setting.state, setting.plan, setting.parts = "compiled", plan, plan.get("parts", {})
    elif "does not fit" in problem:
        setting.state, setting.why = "too large", f"the compiler: {problem}"
    else:
        setting.state, setting.why = ("out of time" if problem == OUT_OF_TIME else "failed"), problem


OUT_OF_TIME = "compiling it took longer than there was time"


def plan_in_process(arguments: Sequence[str], topology: str, folder: Path) -> Runner:
    """A runner that asks `jaxmodels plan`, in a process group of its own that ends with its time.

    Args:
      arguments: of the config.
      topology: its name.
      folder: for results and logs.
    """

    def run(changes: Changes, seconds: float) -> tuple[dict | None, str]:
        name = _digest(changes)
        output, log = folder / f"plan-{name}.json", folder / f"plan-{name}.log"
        output.unlink(missing_ok=True)
        own = [f"--config.{key}={value!r}" for key, value in changes.items()]  # strings in quotes: none alone is None
        command = [sys.executable, "-m", "jaxmodels", "plan", *arguments, *own, f"--topology={topology}", f"--json={output}"]
        with open(log, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
            try:
                process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None, OUT_OF_TIME
        if (plan := _read(output)) is not None:  # also of a step that does not fit
            return plan, ""
        said = [line.removeprefix("jaxmodels: ") for line in log.read_text(errors="replace").splitlines() if line.startswith("jaxmodels: ")]
        return None, f"{said[-1] if said else f'exit status {process.returncode}'} ({log})"

    return run


def _remembered(folder: Path, run: Runner) -> Runner:
    """The runner, which does not compile again what it has compiled."""

    def remembered(changes: Changes, seconds: float) -> tuple[dict | None, str]:
        file = folder / f"{_digest(changes)}.json"
        if (kept := _read(file)) is not None:
            return kept, ""
        plan, problem = run(changes, seconds)
        if plan is not None:  # failures may be of the moment
            _write(file, plan)
        return plan, problem

    return remembered


# The ranking


def rank(settings: Sequence[Setting], room: int) -> list[Setting]:
    """The settings, the best first, each other one with why it is not: those that the compiler has seen before those that only the model has.

    Args:
      settings: as they come.
      room: bytes that a device has.

    Raises:
      ConfigError: none fits.
    """
    for each in settings:
        if each.state in ("compiled", "modelled") and each.bytes > room:
            teller = "compiler" if each.plan else "model"
            each.state, each.why = "too large", f"does not fit by {(each.bytes - room) / 1e9:.1f} GB, says the {teller}"
    order = {"compiled": 0, "modelled": 1, "out of time": 2, "too large": 3, "failed": 4}
    ranked = sorted(settings, key=lambda each: (order[each.state], each.step_seconds if order[each.state] < 3 else each.bytes, each.bytes))
    best = ranked[0]
    if order[best.state] > 1:
        nearest = min(settings, key=lambda each: each.bytes or math.inf)
        raise ConfigError(
            f"no setting fits a device's {room / 1e9:.1f} GB; the nearest, {nearest.name}, takes {nearest.bytes / 1e9:.1f} GB. "
            "Take a larger topology, or a smaller data.batch_size, which changes the run."
        )
    for each in ranked[1:]:
        each.why = each.why or slower(each, best)
    return ranked


def slower(setting: Setting, best: Setting) -> str:
    """By how much, and in which parts, a setting is slower than the best."""
    if setting.plan is None and best.plan is not None:
        before = "not compiled: "
        this, that, parts = setting.seconds, best.seconds, {}
    else:
        before, this, that = "", setting.step_seconds, best.step_seconds
        parts = {name: setting.parts[name] - best.parts.get(name, 0.0) for name in setting.parts}
    if this is None or that is None or this <= that * 1.0005:
        return (
            before
            + ("takes as long" if not before else "not faster by the model")
            + (f", and {(setting.bytes - best.bytes) / 1e9:.1f} GB more" if setting.bytes > best.bytes else "")
        )
    grown = sorted(((seconds, name) for name, seconds in parts.items() if seconds > 0.1 * (this - that)), reverse=True)
    named = ", ".join(f"{_said(name, setting, best)} +{1e3 * seconds:.3g} ms" for seconds, name in grown)
    return f"{before}{this / that - 1:.1%} slower" + (f": {named}" if named else " by the model" if before else "")


def _said(part: str, setting: Setting, best: Setting) -> str:
    """The part; of products, that they are computed again where a setting keeps less."""
    again = setting.changes.get("model.remat") not in (best.changes.get("model.remat"), "none")
    return f"{part} (computed again)" if part in ("matrix products", "attention kernels") and again else part


def print_found(found: Found, console: Console) -> None:
    """The ranked table."""
    table = Table("", "setting", "GB a device", "ms a step", "MFU", "why not", box=None)
    for number, each in enumerate(found.settings, 1):
        if number > SHOWN and not each.own and each.plan is None:
            continue
        known = each.state in ("compiled", "modelled")
        size = f"{each.bytes / 1e9:.1f}" + ("" if each.plan else " ~") if each.bytes else ""
        seconds = f"{1e3 * each.step_seconds:.4g}" + ("" if each.plan else " ~") if known else ""
        mfu = f"{each.plan['mfu']:.1%}" if each.plan and each.plan.get("mfu") else ""
        table.add_row(str(number), each.name + (" (the config's own)" if each.own else ""), size, seconds, mfu, each.why)
    console.print(table)
    if len(found.settings) > SHOWN:
        console.print(f"{len(found.settings)} settings in all; --json=FILE holds each", highlight=False)
    told = "found before, by the same question: nothing was compiled now" if found.cached else f"searched for {found.seconds:.0f} s"
    for note in (*found.notes, f"{told}; ~ says the model, all else the compiler"):
        console.print(note, highlight=False)


# The winner as a config


def write_config(path: str, spec: str, overrides: Mapping[str, str], found: Found) -> None:
    """Writes the best setting as a config that `--config` takes: the original with the values that a search changed.

    Args:
      path: a new file, `.py`; or `.json`, which holds the whole config.
      spec, overrides: of the original, as for `search`.
      found: by it.

    Raises:
      ConfigError: there is such a file, or it has another ending.
    """
    changes = {key: parse_override(text) for key, text in overrides.items()} | found.best.changes
    check_output(path)
    if path.endswith(".json"):
        Path(path).write_text(json.dumps(load_config(spec, changes).to_dict(), indent=2) + "\n")
        return
    file, argument = split_spec(spec)
    relative = os.path.relpath(os.path.abspath(file), os.path.dirname(os.path.abspath(path)))
    suffix = "" if argument is None else f":{argument}"
    best = found.best
    says = "the compiler" if best.plan else "the analytic model"
    lines = [
        f'"""{file}{suffix} as `jaxmodels plan --search` found it best on {found.topology}: {best.name}.',
        "",
        f"{1e3 * best.step_seconds:.4g} ms a step and {best.bytes / 1e9:.1f} GB a device, says {says}.",
        '"""',
        "",
        "from pathlib import Path",
        "",
        "from jaxmodels.config import load_config",
        "",
        "CHANGES = {",
        *(f"    {json.dumps(key)}: {json.dumps(value) if isinstance(value, str) else repr(value)}," for key, value in changes.items()),
        "}",
        "",
        "",
        "def get_config():",
        f'    return load_config(f"{{Path(__file__).parent / {relative!r}}}{suffix}", CHANGES)',
        "",
    ]
    Path(path).write_text("\n".join(lines))


def check_output(path: str) -> None:
    """Raises ConfigError where `--write` cannot be written; before anything is searched."""
    if not path.endswith((".py", ".json")):
        raise ConfigError(f"--write={path}: a config is a .py or a .json file.")
    if os.path.exists(path):
        raise ConfigError(f"--write={path}: there is such a file; give another name, or delete it.")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ConfigError(f"--write={path}: there is no folder {os.path.dirname(path)!r}.")


# What was found before


def _key(experiment: Experiment, topology: str) -> str:
    """Of all that a search's result depends on."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")}
    code = hashlib.sha256()
    root = Path(jaxmodels.__file__).parent
    for file in sorted(root.rglob("*.py")):
        code.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return _digest({"config": experiment.config, "topology": topology, "versions": versions, "code": code.hexdigest()})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _digest(values: Mapping) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _read(path: Path) -> dict | None:
    """A JSON file; None where there is none, or it was cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, values: Mapping) -> None:
    """Whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(values))
    part.replace(path)


def _setting(values: Mapping) -> Setting:
    """A setting from JSON, where tuples have become lists."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(Setting)}
    fields["changes"] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["changes"].items()}
    return Setting(**fields)
