"""`jaxmodels plan --search`: the mesh, accumulation and rematerialisation with which a config's step is fastest on a topology.

Three sieves, each finer and slower than the one before:

1. Shapes: meshes that do not divide, or whose state alone fills a device, are dropped (`plan.candidates`).
2. Models: the step is traced for a mesh; `plan.memory` says whether it fits, `plan.roofline` how long it takes. Seconds each.
3. The compiler: the config's own setting and the promising ones go through `jaxmodels plan`, in processes of their own.

All settings compute the same loss from the same global batch.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jaxmodels
from jaxmodels.config import load_config, parse_override
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.hardware import absent, topologies
from jaxmodels.plan import candidates as candidates_lib
from jaxmodels.plan import memory, roofline
from jaxmodels.plan.candidates import Candidate, Changes, changed, mesh_changes, rank
from jaxmodels.plan.plan import versions
from jaxmodels.training.compile import cache_folder

# The memory model is within a tenth of the compiler (tests/plan/test_memory_model.py): what is further above a device's memory is not compiled.
MARGIN = 1.1
# Share of the budget for the models; the compiler has the rest.
MODEL_SHARE = 0.3
# At most so many meshes are modelled, meshes varied, settings compiled, and compiled with the same mesh.
MESHES, VARIED, COMPILED, SAME = 40, 5, 16, 5
# Host memory in bytes that compiling one large step needs (benchmarks/memory_model.py prints it).
COMPILER_MEMORY = 8e9
OUT_OF_TIME = "compiling it took longer than the budget"


@dataclasses.dataclass
class SearchResult:
    """The result of a search.

    Attributes:
      topology: its name.
      settings: the best one first.
      notes: what was left out, and what the ranking is by.
      seconds: that it took.
      cached: whether an earlier search of the same question found it.
    """

    topology: str
    settings: list[Candidate]
    notes: list[str]
    seconds: float
    cached: bool = False

    @property
    def best(self) -> Candidate:
        return self.settings[0]

    def to_json(self) -> dict:
        rest = {key: getattr(self, key) for key in ("topology", "seconds", "cached", "notes")}
        return rest | {"settings": [{"setting": each.name, **dataclasses.asdict(each)} for each in self.settings]}


# (changes of a setting, seconds it may take) -> what `jaxmodels plan --json` wrote, or None and why there is nothing.
Runner = Callable[[Changes, float], tuple[dict | None, str]]


def search(spec: str, overrides: Mapping[str, str], topology: str, *, budget: float = 900.0, data_dir: str | None = None) -> SearchResult:
    """Search the settings of a config on a topology; the same question to the same versions is answered from the cache.

    Args:
      spec: of the config, as `--config` takes it.
      overrides: dotted keys to the text of their values, as on the command line.
      topology: its name.
      budget: seconds that it may take.
      data_dir: the data directory.

    Raises:
      ConfigError: the config or the topology is wrong; or nothing fits, with the nearest.
    """
    experiment = build_experiment(load_config(spec, {key: parse_override(text) for key, text in overrides.items()}), data_dir=data_dir)
    place = topologies.parse(topology)
    folder = cache_folder().parent / "search" / _key(experiment, topology)
    known = _read(folder / "found.json")
    if known is not None and known["budget"] >= budget:
        return SearchResult(topology, [_candidate(each) for each in known["settings"]], known["notes"], known["seconds"], cached=True)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [f"--config={spec}", *(f"--config.{key}={text}" for key, text in overrides.items()), *([f"--data_dir={data_dir}"] if data_dir else [])]
    runner = plan_in_process(arguments, topology, folder) if absent.has_compiler(place.chip.platform) else None
    result = find(experiment, place, budget=budget, run=runner, workers=workers())
    part = folder / f"found.{os.getpid()}.part"
    part.write_text(json.dumps({"budget": budget, **result.to_json()}))
    part.replace(folder / "found.json")
    return result


def workers() -> int:
    """Compilations at a time: one for each core, with room in memory."""
    free = next((int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")), COMPILER_MEMORY)
    return max(1, min(len(os.sched_getaffinity(0)), int(free // COMPILER_MEMORY)))


def find(experiment: Experiment, topology: Any, *, budget: float, run: Runner | None, workers: int) -> SearchResult:
    """Search, without the cache.

    Args:
      experiment: as `build_experiment` returns.
      topology: as `hardware.topologies.parse` returns.
      budget: seconds that it may take.
      run: compiles a setting; None if there is no compiler, and the models decide alone.
      workers: compilations at a time.
    """
    started = time.monotonic()
    modelled, notes = model_settings(experiment, topology, started + budget * (MODEL_SHARE if run else 1.0))
    if run is None:
        notes.append(f"there is no compiler for {topology.name} here: ranked by the analytic models of memory and time alone")
    else:
        compile_promising(modelled, run, workers, started + budget, notes)
    return SearchResult(topology.name, rank(modelled, topology.chip.memory_per_device), notes, time.monotonic() - started)


# The models


def model_settings(experiment: Experiment, topology: Any, until: float) -> tuple[list[Candidate], list[str]]:
    """Return settings with the models' figures, and notes: each mesh with the lightest policy, then every policy and accumulation of the fastest meshes.

    Args:
      experiment, topology: as for `find`.
      until: the time (`time.monotonic`) to end at.
    """
    room, notes, settings, late = topology.chip.memory_per_device, [], [], 0
    try:
        settings.append(Candidate(_own_changes(experiment, topology), own=True))
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
        traced = roofline.trace(changed(experiment, base.changes | least), topology.devices, topology.chip)
        counts = candidates_lib.accumulations(experiment, base.mesh)
        for policy in candidates_lib.policies(experiment, traced):
            for count in counts:
                if _worth_a_look(policy, count, base, settings, room):
                    late += not _add(settings, base.changes | policy | {"training.accumulate": count}, experiment, topology, until)
    if late:
        notes.append(f"{late} settings were not looked at: the time for the models was over (a larger --budget has room for them)")
    return settings, notes


def _own_changes(experiment: Experiment, topology: Any) -> Changes:
    """The config's own setting, in the form of a candidate."""
    sizes = dataclasses.replace(experiment.mesh, slices=max(experiment.mesh.slices, topology.slices))
    mesh = memory.planned_mesh(sizes, topology.devices, topology.chip.platform).shape
    model = experiment.config["model"]
    keys = {f"model.{key}": model[key] for key in ("remat", "offload") if key in model}
    return mesh_changes(mesh) | {"training.accumulate": experiment.training.accumulate} | keys


def _worth_a_look(policy: Changes, count: int, base: Candidate, settings: Sequence[Candidate], room: int) -> bool:
    """Whether a variant may be better than those of its mesh and policy that fit: more parts only cost time, and so does offloading."""
    same = [each for each in settings if each.state == "modelled" and each.memory <= room and each.mesh == base.mesh]
    same = [each for each in same if each.changes.get("model.remat") == policy.get("model.remat")]
    fewer = any(each.changes["training.accumulate"] < count for each in same)
    return not fewer and not (policy.get("model.offload") and any(not each.changes.get("model.offload") for each in same))


def _add(settings: list[Candidate], changes: Changes, experiment: Experiment, topology: Any, until: float) -> bool:
    """Model a setting that is not there yet. Returns False if it is too late for that."""
    if any(each.changes == changes for each in settings):
        return True
    if time.monotonic() > until:
        return False
    setting = Candidate(changes)
    try:
        _model(setting, experiment, topology)
    except ConfigError as error:
        setting.state, setting.why = "failed", str(error)
    settings.append(setting)
    return True


def _model(setting: Candidate, experiment: Experiment, topology: Any) -> None:
    traced = roofline.trace(changed(experiment, setting.changes), topology.devices, topology.chip)
    setting.memory = memory.peak(traced).total
    estimate = roofline.estimate_traced(traced, topology)
    setting.seconds, setting.parts = estimate.seconds, estimate.parts
    if setting.memory > topology.chip.memory_per_device * MARGIN:
        setting.does_not_fit(setting.memory - topology.chip.memory_per_device, "model")


# The compiler


def compile_promising(settings: list[Candidate], run: Runner, workers: int, until: float, notes: list[str]) -> None:
    """Compile the config's own setting and then the promising ones, the fastest first, until the time is over."""
    waiting, longest = promising(settings), 0.0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running: dict[concurrent.futures.Future, tuple[Candidate, float]] = {}
        while waiting or running:
            # One that would not be done in time is not begun.
            while waiting and len(running) < workers and time.monotonic() + longest < until:
                setting = waiting.pop(0)
                running[pool.submit(run, setting.changes, until - time.monotonic())] = (setting, time.monotonic())
            if not running:
                break
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                setting, began = running.pop(future)
                longest = max(longest, time.monotonic() - began)
                _record(setting, *future.result())
    if waiting:
        notes.append(f"{len(waiting)} promising settings were not compiled: the time was over (a larger --budget has room for them)")


def promising(settings: Sequence[Candidate]) -> list[Candidate]:
    """Settings to compile: the config's own, then the fastest that fit, by the models; of a mesh SAME at most, since those that differ
    in rematerialisation alone are more alike than the models are exact."""
    chosen, of_mesh = [], collections.Counter()
    for each in sorted((each for each in settings if each.state == "modelled" and not each.own), key=lambda each: each.seconds):
        mesh = tuple(each.mesh.values())
        of_mesh[mesh] += 1
        if of_mesh[mesh] <= SAME:
            chosen.append(each)
    return [*(each for each in settings if each.own), *chosen[: COMPILED - 1]]


def _record(setting: Candidate, plan: dict | None, problem: str) -> None:
    """Record the compiler's answer."""
    if plan is not None and not plan["fits"]:
        setting.does_not_fit(plan["peak_bytes_per_device"] - plan["device_bytes"], "compiler")
    elif plan is not None:
        setting.state, setting.plan, setting.parts = "compiled", plan, plan.get("parts", {})
    elif "does not fit" in problem:
        setting.state, setting.why = "too large", f"the compiler: {problem}"
    else:
        setting.state, setting.why = ("out of time" if problem == OUT_OF_TIME else "failed"), problem


def plan_in_process(arguments: Sequence[str], topology: str, folder: Path) -> Runner:
    """Return a runner of `jaxmodels plan`, in a process group that ends with its time. What it wrote before is not compiled again.

    Args:
      arguments: of the config.
      topology: its name.
      folder: for results and logs.
    """

    def run(changes: Changes, seconds: float) -> tuple[dict | None, str]:
        output = folder / f"plan-{_digest(changes)}.json"
        log = output.with_suffix(".log")
        if (plan := _read(output)) is not None:
            return plan, ""
        own = [f"--config.{key}={value!r}" for key, value in changes.items()]  # strings in quotes: none alone is None
        command = [sys.executable, "-m", "jaxmodels", "plan", *arguments, *own, f"--topology={topology}", f"--json={output}"]
        status = run_process(command, log, seconds)
        if status is None:
            return None, OUT_OF_TIME
        if (plan := _read(output)) is not None:  # also of a step that does not fit
            return plan, ""
        said = [line.removeprefix("jaxmodels: ") for line in log.read_text(errors="replace").splitlines() if line.startswith("jaxmodels: ")]
        return None, f"{said[-1] if said else f'exit status {status}'} ({log})"

    return run


def run_process(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command in a process group of its own. Returns its exit status; None if its time was over, and the group was killed."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


# The cache


def _key(experiment: Experiment, topology: str) -> str:
    """Digest of all that a search's result depends on."""
    code, root = hashlib.sha256(), Path(jaxmodels.__file__).parent
    for file in sorted(root.rglob("*.py")):
        code.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return _digest(
        {
            "config": experiment.config,
            "topology": topology,
            "versions": versions() | {name: metadata.version(name) for name in ("flax", "optax")},
            "code": code.hexdigest(),
        }
    )


def _digest(values: Mapping) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _read(path: Path) -> dict | None:
    """A JSON file; None if it is missing or cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _candidate(values: Mapping) -> Candidate:
    """A setting from JSON, where tuples have become lists."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(Candidate)}
    fields["changes"] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["changes"].items()}
    return Candidate(**fields)
