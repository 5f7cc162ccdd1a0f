"""The record of a run in `manifest.json`: versions, devices, data, compilations, and every fallback."""

import contextlib
import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax

from jaxmodels.experiment.experiment import Experiment
from jaxmodels.parallel import pipeline
from jaxmodels.runs import disk
from jaxmodels.runs.folder import RunFolder, now, shortened
from jaxmodels.step.state import TrainState
from jaxmodels.training.compile import CompileRecord

_PACKAGES = ("jaxmodels", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Manifest:
    """Writes a run's manifest, in the first process only, and prints the parts that users should see."""

    def __init__(self, folder: RunFolder, say: Callable[..., None], *, active: bool):
        """
        Args:
          folder: the run folder.
          say: function that prints a line, with a style.
          active: whether this is the first process; others record nothing.
        """
        self._folder, self._say, self._active = folder, say, active
        self._failed = False

    def warn(self, message: str) -> None:
        """Print a warning, and record it as a fallback."""
        self._say("warning: " + message, style="yellow")
        self.fallback(message)

    def fallback(self, message: str) -> None:
        """Record a fallback: a slower or less exact path that was used."""
        if self._active:
            with self._may_fail():
                self._folder.add_to_manifest("fallbacks", message)

    def record(self, values: Mapping[str, Any]) -> None:
        """Set keys in the entry of this start."""
        if self._active and values:
            starts = self._folder.manifest()["starts"]
            starts[-1] |= values
            with self._may_fail():
                self._folder.update_manifest(starts=starts)

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Go on where the file cannot be written, such as on a full disk; say so once."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._say(f"warning: {self._folder.manifest_file} cannot be written ({error.strerror}): training goes on without it", style="yellow")

    def compiled(self, record: CompileRecord, executable: Any = None) -> None:
        """Print and record the compilation of a function; `executable` is the saved one that was requested, if any."""
        how = f"loaded from {record.loaded}" if record.loaded else "loaded from the cache" if record.cached else "compiled"
        if record.not_loaded:
            self.warn(f"{record.name}: {executable.folder} is not loaded: {record.not_loaded}; the step is compiled instead")
        given = ", ".join(f"{name}={value}" for name, value in record.options.items())
        self._say(f"{record.name}: {how} in {record.seconds:.1f} s{' with ' + given if given else ''}", style="dim")
        for name, reason in record.rejected.items():
            self.warn(f"the compiler option {name} is not used, because this compiler rejects it: {reason}")
        if self._active:
            entry = {key: value for key, value in dataclasses.asdict(record).items() if value not in (None, {})}
            self.record({"compiled": self._folder.manifest()["starts"][-1]["compiled"] | {record.name: entry}})

    def start(self, experiment: Experiment, mesh: jax.sharding.Mesh, shapes: TrainState, step: int) -> None:
        """Record a start from `step`: versions, devices, kernels, parameters and data."""
        if not self._active:
            return
        trained, frozen = (experiment.count_parameters(part) for part in (shapes.params, shapes.frozen))
        devices = mesh.devices.flatten()
        start = {
            "time": now(),
            "from_step": step,
            "python": platform.python_version(),
            "packages": {package: metadata.version(package) for package in _PACKAGES},
            "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
            "processes": jax.process_count(),
            "mesh": dict(mesh.shape),
            "compiled": {},
        }
        for part, used in experiment.kernels.items():
            start[part] = used
            self._say(f"{part}: {used['used']} ({used['why']})", style="dim")
        if (stages := mesh.shape["pipeline"]) > 1:
            microbatches = experiment.layout.microbatches
            start["pipeline"] = {"stages": stages, "microbatches": microbatches, "bubble": pipeline.bubble(stages, microbatches)}
            self._say(f"pipeline: {pipeline.describe(stages, microbatches)}", style="dim")
        manifest = self._folder.manifest()
        tokenizer = experiment.dataset.info.get("tokenizer")
        with disk.must_write(self._folder.path):
            self._folder.update_manifest(
                parameters=trained + frozen,
                trained_parameters=trained,
                # Those of a run that goes on with other values are written with its changes (`training.changes`).
                steps=manifest.get("steps", experiment.steps),
                data=manifest["data"] if "data" in manifest else describe_data(experiment),
                info={key: value for key, value in experiment.dataset.info.items() if key != "tokenizer"},
                guesses=list(experiment.dataset.guesses),
                skipped_examples=dict(experiment.dataset.skipped),
                parents=manifest.get("parents", []),
                fallbacks=manifest.get("fallbacks", []),
                **shortened(manifest, "starts", [*manifest.get("starts", []), start]),
            )
            if tokenizer is not None:
                self._folder.tokenizer_file.write_text(tokenizer.to_json(), encoding="utf-8")
        share = f", {trained:,} of them trained ({trained / (trained + frozen):.2%})" if frozen else ""
        self._say(f"{trained + frozen:,} parameters{share} on {start['devices']}; run folder {self._folder.path}")


def describe_data(experiment: Experiment) -> dict[str, dict[str, int]]:
    """Return the number of examples of each split, and a checksum for splits in memory."""
    parts = experiment.dataset.splits.items()
    return {name: {"examples": len(part)} | ({"crc32": part.fingerprint()} if hasattr(part, "fingerprint") else {}) for name, part in parts}
