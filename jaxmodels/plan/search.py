"""Search for the mesh, accumulation and rematerialisation with which a config's step is fastest on a topology (`jaxmodels plan --search`).

Three stages, each more exact and slower than the one before:

1. Shapes: meshes that do not divide, or whose state alone exceeds a device's memory, are dropped (`plan.candidates`).
2. Models: the step is traced for a mesh, in seconds. `plan.memory` estimates its memory, `plan.roofline` its time.
3. The compiler: `jaxmodels plan` compiles the config's own setting and the promising ones, each in a separate process.

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

# The memory model is within a tenth of the compiler (tests/plan/test_memory_model.py): a setting that exceeds a device's memory by more is not compiled.
MARGIN = 1.1
# Fraction of the budget for the models; the rest is for the compiler.
MODEL_SHARE = 0.3
# Maximum numbers: of modelled meshes, of meshes whose policies are varied, of compiled settings, and of compiled settings with the same mesh.
MESHES, VARIED, COMPILED, SAME = 40, 5, 16, 5
# Host memory in bytes that compiling one large step needs (benchmarks/memory_model.py prints it).
COMPILER_MEMORY = 8e9
OUT_OF_TIME = "compiling it took longer than the budget"


@dataclasses.dataclass
class SearchResult:
    """The result of a search.

    Attributes:
      topology: name of the topology.
      settings: the best one first.
      notes: what was left out, and what the ranking is based on.
      seconds: duration of the search.
      cached: whether it was read from the cache of an earlier search.
    """

    topology: str
    settings: list[Candidate]
    notes: list[str]
    seconds: float
    cached: bool = False

    @property
    def best(self) -> Candidate:
        """The fastest setting that fits."""
        return self.settings[0]

    def to_json(self) -> dict:
        """Return the result as `--json` writes it."""
        rest = {key: getattr(self, key) for key in ("topology", "seconds", "cached", "notes")}
        return rest | {"settings": [{"setting": each.name, **dataclasses.asdict(each)} for each in self.settings]}


# (changes of a setting, time limit in seconds) -> (output of `jaxmodels plan --json`, ""), or (None, the reason).
Runner = Callable[[Changes, float], tuple[dict | None, str]]


def search(spec: str, overrides: Mapping[str, str], topology: str, *, budget: float = 900.0, data_dir: str | None = None) -> SearchResult:
    """Search the settings of a config on a topology. A search of the same config, topology and versions is read from the cache.

    Args:
      spec: of the config, as in `--config`.
      overrides: dotted keys to the text of their values, as on the command line.
      topology: name of the topology.
      budget: time limit in seconds.
      data_dir: the data directory.

    Raises:
      ConfigError: the config or the topology is wrong; or no setting fits, and the message states the nearest.
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
    """Return the number of parallel compilations: one for each core, as far as the free host memory allows."""
    free = next((int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:")), COMPILER_MEMORY)
    return max(1, min(len(os.sched_getaffinity(0)), int(free // COMPILER_MEMORY)))


def find(experiment: Experiment, topology: Any, *, budget: float, run: Runner | None, workers: int) -> SearchResult:
    """Search, without the cache.

    Args:
      experiment: as `build_experiment` returns.
      topology: as `hardware.topologies.parse` returns.
      budget: time limit in seconds.
      run: compiles a setting; None without a compiler: the ranking is then that of the models.
      workers: number of parallel compilations.
    """
    started = time.monotonic()
    modelled, notes = model_settings(experiment, topology, started + budget * (MODEL_SHARE if run else 1.0))
    if run is None:
        notes.append(f"no compiler for {topology.name} is installed: the ranking is that of the analytic models of memory and time")
    else:
        compile_promising(modelled, run, workers, started + budget, notes)
    return SearchResult(topology.name, rank(modelled, topology.chip.memory_per_device), notes, time.monotonic() - started)


# The models


def model_settings(experiment: Experiment, topology: Any, until: float) -> tuple[list[Candidate], list[str]]:
    """Return settings with the models' figures, and notes: each mesh with the lightest policy, then every policy and accumulation of the fastest meshes.

    Args:
      experiment, topology: as for `find`.
      until: time (`time.monotonic`) at which to end.
    """
    available, notes, settings, late = topology.chip.memory_per_device, [], [], 0
    try:
        settings.append(Candidate(_own_changes(experiment, topology), own=True))
        _model(settings[0], experiment, topology)
    except ConfigError as error:  # often a mesh for another number of devices
        settings.clear()
        notes.append(f"the config's own setting is not ranked: {error}")
    meshes = candidates_lib.meshes(experiment, topology)
    fitting = [mesh for mesh, state in meshes if state < available]
    if len(fitting) < len(meshes):
        notes.append(f"{len(meshes) - len(fitting)} of {len(meshes)} meshes left out: the state alone needs more than the {available / 1e9:.1f} GB of a device")
    if len(fitting) > MESHES:
        notes.append(f"{len(fitting) - MESHES} meshes with more shards of the model were not tried")
    least = candidates_lib.lightest(experiment)
    for mesh in fitting[:MESHES]:
        allowed = candidates_lib.accumulations(experiment, mesh)
        at = experiment.training.accumulate if experiment.training.accumulate in allowed else allowed[-1]
        changes = mesh_changes(mesh) | candidates_lib.context_changes(experiment, mesh) | {"training.accumulate": at} | least
        late += not _add(settings, changes, experiment, topology, until)
    ranked = sorted((each for each in settings if each.state == "modelled"), key=lambda each: (each.memory > available * MARGIN, each.seconds))
    for base in ranked[:VARIED]:
        traced = roofline.trace(changed(experiment, base.changes | least), topology.devices, topology.chip)
        counts = candidates_lib.accumulations(experiment, base.mesh)
        for policy in candidates_lib.policies(experiment, traced):
            for count in counts:
                if _may_be_better(policy, count, base, settings, available):
                    late += not _add(settings, base.changes | policy | {"training.accumulate": count}, experiment, topology, until)
    if late:
        notes.append(f"{late} settings were not modelled within the budget; raise --budget to model them")
    return settings, notes


def _own_changes(experiment: Experiment, topology: Any) -> Changes:
    """Return the config's own setting as changes."""
    sizes = dataclasses.replace(experiment.mesh, slices=max(experiment.mesh.slices, topology.slices))
    mesh = memory.planned_mesh(sizes, topology.devices, topology.chip.platform).shape
    model = experiment.config["model"]
    keys = {f"model.{key}": model[key] for key in ("remat", "offload") if key in model}
    return mesh_changes(mesh) | {"training.accumulate": experiment.training.accumulate} | keys


def _may_be_better(policy: Changes, count: int, base: Candidate, settings: Sequence[Candidate], available: int) -> bool:
    """Return whether a variant may be faster than those of its mesh and policy that fit. More microbatches only take more time, and so does offloading."""
    same = [each for each in settings if each.state == "modelled" and each.memory <= available and each.mesh == base.mesh]
    same = [each for each in same if each.changes.get("model.remat") == policy.get("model.remat")]
    fewer = any(each.changes["training.accumulate"] < count for each in same)
    return not fewer and not (policy.get("model.offload") and any(not each.changes.get("model.offload") for each in same))


def _add(settings: list[Candidate], changes: Changes, experiment: Experiment, topology: Any, until: float) -> bool:
    """Model a setting that is not in the list yet, and add it. Return False if the time is over."""
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
            # Do not start a compilation that is expected to end too late.
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
        notes.append(f"{len(waiting)} promising settings were not compiled within the budget; raise --budget to compile them")


def promising(settings: Sequence[Candidate]) -> list[Candidate]:
    """Return the settings to compile: the config's own, then the fastest that fit according to the models.

    At most SAME have the same mesh: settings that differ only in rematerialisation differ by less than the error of the models.
    """
    chosen, of_mesh = [], collections.Counter()
    for each in sorted((each for each in settings if each.state == "modelled" and not each.own), key=lambda each: each.seconds):
        mesh = tuple(each.mesh.values())
        of_mesh[mesh] += 1
        if of_mesh[mesh] <= SAME:
            chosen.append(each)
    return [*(each for each in settings if each.own), *chosen[: COMPILED - 1]]


def _record(setting: Candidate, plan: dict | None, problem: str) -> None:
    """Record the result of a compilation."""
    if plan is not None and not plan["fits"]:
        setting.does_not_fit(plan["peak_bytes_per_device"] - plan["device_bytes"], "compiler")
    elif plan is not None:
        setting.state, setting.plan, setting.parts = "compiled", plan, plan.get("parts", {})
    elif "does not fit" in problem:
        setting.state, setting.why = "too large", f"the compiler: {problem}"
    else:
        setting.state, setting.why = ("out of time" if problem == OUT_OF_TIME else "failed"), problem


def plan_in_process(arguments: Sequence[str], topology: str, folder: Path) -> Runner:
    """Return a runner of `jaxmodels plan` in a process group with a time limit. A setting with a result in the folder is not compiled again.

    Args:
      arguments: of the config.
      topology: name of the topology.
      folder: for results and logs.
    """

    def run(changes: Changes, seconds: float) -> tuple[dict | None, str]:
        output = folder / f"plan-{_digest(changes)}.json"
        log = output.with_suffix(".log")
        if (plan := _read(output)) is not None:
            return plan, ""
        own = [f"--config.{key}={value!r}" for key, value in changes.items()]  # quoted strings: without quotes, none would be None
        command = [sys.executable, "-m", "jaxmodels", "plan", *arguments, *own, f"--topology={topology}", f"--json={output}"]
        status = run_process(command, log, seconds)
        if status is None:
            return None, OUT_OF_TIME
        if (plan := _read(output)) is not None:  # also of a step that does not fit
            return plan, ""
        errors = [line.removeprefix("jaxmodels: ") for line in log.read_text(errors="replace").splitlines() if line.startswith("jaxmodels: ")]
        return None, f"{errors[-1] if errors else f'exit status {status}'} ({log})"

    return run


def run_process(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command in a new process group. Return its exit status; None if it reached the time limit and the group was killed."""
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
    """Return a digest of everything that a search's result depends on."""
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
    """Return the content of a JSON file; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _candidate(values: Mapping) -> Candidate:
    """Return a setting from JSON, in which tuples are lists."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(Candidate)}
    fields["changes"] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["changes"].items()}
    return Candidate(**fields)
