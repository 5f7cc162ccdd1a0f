"""Comparison of a run with its plan: step time and memory."""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError
from jaxmodels.hardware.chips import chip_of
from jaxmodels.training.callback import Callback
from jaxmodels.training.executable import PAGE, Saved, open_saved
from jaxmodels.training.throughput import peak_memory

# Number of untimed first steps, in which devices and caches warm up; then the number of steps whose median is compared.
WARM_UP, TIMED = 3, 7
# A measured figure above so many times the planned one is reported.
FAR = {"step_seconds": 1.25, "peak_bytes_per_device": 1.10}
# Parts of a config that decide time and memory of a step; `mesh` is compared as resolved.
_DECIDING = ("model", "task", "lora", "data.batch_size", "optimizer.name", "training.accumulate", "training.precision", "training.ema")
_DECIDING += ("training.trainable", "training.freeze", "sharding", "partition", "compiler_options")


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan that a run was given.

    Attributes:
      path: the file or folder.
      figures: at least `step_seconds` and `peak_bytes_per_device`; of `plan --json` also `chip`, `devices`, `mesh`, `config`.
      saved: the executable, if the plan has one.
    """

    path: Path
    figures: dict[str, Any]
    saved: Saved | None

    def differences(self, config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> str:
        """Return in one line what differs from the plan in the devices, and in config keys that decide time and memory; empty if nothing does."""
        chip = chip_of(mesh.devices.flat[0].device_kind)
        here = {"chip": chip.name if chip else mesh.devices.flat[0].device_kind, "devices": mesh.size, "mesh": dict(mesh.shape), "config": config}
        there = {key: self.figures.get(key) for key in here}
        if self.saved:  # its page has these even if its figures lack them
            page = self.saved.page
            there = {"chip": page["devices"]["kind"], "devices": page["devices"]["count"], "mesh": page["mesh"], "config": page["config"]}
        there, here = (json.loads(json.dumps(each)) for each in (there, here))
        changed = config_lib.differences(there, here)
        named = (key for key in changed if not key.startswith("config.") or any(f"{key}.".startswith(f"config.{part}.") for part in _DECIDING))
        return "; ".join(f"{key} is {changed[key][0]!r} in the plan, {changed[key][1]!r} here" for key in named)


def open_plan(path: str | os.PathLike) -> Planned:
    """Open what `jaxmodels plan` wrote with `--json=FILE` or `--save=FOLDER`.

    Raises:
      ConfigError: it is neither.
    """
    path = Path(path).absolute()
    if path.is_file():
        try:
            saved, figures = None, json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--plan={path} is neither JSON ({error}) nor a folder: give what jaxmodels plan wrote, --json=FILE or --save=FOLDER.") from error
    else:
        saved = open_saved(path)
        figures = saved.page["plan"]
    if not isinstance(figures, dict) or not all(isinstance(figures.get(name), (int, float)) and figures[name] > 0 for name in FAR):
        raise ConfigError(
            f"--plan={path}: {PAGE if saved else 'the file'} has no {' or no '.join(FAR)}, which jaxmodels plan writes; run jaxmodels plan again."
        )
    return Planned(path, figures, saved)


def for_training(path: str | os.PathLike | None) -> dict[str, Any]:
    """Return what a plan adds to the arguments of `trainer.train`: a callback that compares, and the executable. Nothing for None."""
    if path is None:
        return {"callbacks": [], "executable": None}
    planned = open_plan(path)
    return {"callbacks": [Comparison(planned)], "executable": planned.saved}


class Comparison(Callback):
    """Times the first steps of a run one by one, and compares them with its plan."""

    def __init__(self, planned: Planned):
        self._planned = planned
        self._seconds: list[float] | None = None  # None before and after the comparison

    def on_start(self, run):
        """Begin, unless the plan is for another run."""
        if other := self._planned.differences(run.experiment.config, run.mesh):
            run.warn(f"this run is not compared with {self._planned.path}, a plan for another run: {other}")
        else:
            self._seconds = []

    def on_step(self, run, step, metrics):
        """Wait for the devices, in the first steps alone, and compare once there are enough."""
        if self._seconds is None:
            return
        jax.block_until_ready(metrics)
        self._seconds.append(time.perf_counter() - run.step_started)
        if len(self._seconds) == WARM_UP + TIMED:
            self._compare(run)

    def on_end(self, run, result):
        """Compare what there is, for a run of a few steps."""
        if self._seconds and result is not None:
            self._compare(run)

    def _compare(self, run) -> None:
        """Record planned and measured figures, and warn of each that is far above its plan."""
        record, far = self.result(run.mesh)
        self._seconds = None
        run.record({"plan": record})
        for line in far:
            run.warn(line)

    def result(self, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], list[str]]:
        """Return a record for the manifest, and a line for each figure far above its plan. Time is left out of a run that ended during warm-up."""
        timed, planned = self._seconds[WARM_UP:], self._planned
        measured = {"step_seconds": statistics.median(timed) if timed else None, "peak_bytes_per_device": peak_memory(mesh)}
        record = {"path": str(planned.path)} | {name: {"planned": planned.figures[name], "measured": value} for name, value in measured.items()}
        lines = []
        for name, value in measured.items():
            expected = planned.figures[name]
            if value is None or value <= FAR[name] * expected:
                continue
            more = f"{value / expected - 1:.0%} more than the"
            if name == "step_seconds":
                lines.append(
                    f"the step time is {value:.4g} s, {more} {expected:.4g} s planned in {planned.path} (median of {len(timed)} steps after {WARM_UP})"
                )
            else:
                lines.append(f"the peak memory of a device is {value / 1e9:.3g} GB, {more} {expected / 1e9:.3g} GB planned in {planned.path}")
        return record, lines
