"""A run that goes on with another config: what its checkpoint knows, taken up by the new plan, and the record of each change.

A change takes effect at the checkpoint that the run goes on from. The checkpoint's page of progress has the config that it was trained with, so
what follows from a change is the same again if the process dies before the next checkpoint. The change is written into the run folder right
before the first metrics, checkpoint or result that it affects: `manifest.json` first, then `config.json`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels import config as config_lib
from jaxmodels.data.evaluation_sets import KEYS, is_named
from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import count_steps, with_steps
from jaxmodels.experiment.changeable import covers
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.experiment.sections import resolve
from jaxmodels.runs import disk
from jaxmodels.runs.folder import RunFolder, now
from jaxmodels.runs.going_back import last_going_back, saved_steps, set_tests_aside
from jaxmodels.runs.progress import Progress
from jaxmodels.step import optimizer
from jaxmodels.step.state import TrainState
from jaxmodels.training.callback import Callback
from jaxmodels.training.manifest import describe_data

Flat = dict[str, Any]  # dotted key -> JSON value
ABSENT = "(absent)"  # in `config_lib.differences`
_LENGTH = ("training.steps", "training.epochs", "data.batch_size")
_RATE = (*_LENGTH, "optimizer.learning_rate", "optimizer.schedule")
_ORDER = ("data.sources", "data.shuffle", "data.shuffle_window", "data.balance")
_SETS = tuple(f"data.{key}" for key in KEYS.values())
_ENDS = (*_LENGTH, "evaluation.patience", "checkpoint.best", "callbacks")  # with another value, a finished run may go on


# Configs as flat dictionaries, and the changes that the manifest lists


def flat(config: Mapping) -> Flat:
    """Return a config by dotted keys, with the defaults of keys that an earlier version did not have."""
    return dict(_flat(json.dumps(config)))


@functools.lru_cache(maxsize=4)  # a start compares the same few configs several times
def _flat(text: str) -> Flat:
    config = json.loads(text)
    try:
        config = json.loads(json.dumps(resolve(config)))
    except ConfigError:
        pass  # written by a version with other keys: compare it unresolved
    return config_lib.flatten(config)


def nested(values: Flat) -> dict:
    """Return a flat config as nested dictionaries."""
    result: dict = {}
    for key, value in values.items():
        config_lib.set_at(result, key, value)
    return result


def stored(folder: RunFolder) -> Flat | None:
    """Return the config of the run in a folder; None if there is no run.

    `config.json` lacks the changes of a start that died between its two writes, which the manifest has.
    """
    config = folder.stored_config()
    if config is None:
        return None
    values = flat(config)
    last = {entry["key"]: entry for entry in folder.manifest().get("changes", [])}
    return _with(values, [(key, entry["new"]) for key, entry in last.items() if values.get(key, ABSENT) == entry["old"]])


def stored_at(folder: RunFolder, step: int) -> Flat:
    """Return the config that a run had up to a step, by the manifest: without its later changes, in whose place the same keys had `old`."""
    entries = [entry for entry in folder.manifest().get("changes", []) if entry["step"] >= step]
    return _with(stored(folder) or {}, [(entry["key"], entry["old"]) for entry in reversed(entries)])


def _with(values: Flat, pairs: Sequence[tuple[str, Any]]) -> Flat:
    values = dict(values)
    for key, value in pairs:
        values[key] = value
    return {key: value for key, value in values.items() if value != ABSENT}


# The state


def optimizer_state(experiment: Experiment, config: Flat, shapes: TrainState) -> Any:
    """Return the shapes of the optimizer's state for the `optimizer` section of another config."""
    options, own = optimizer.from_section(nested(config)["optimizer"])
    return jax.eval_shape(optimizer.make_optimizer(options, own, experiment.schedule).init, shapes.params)


def as_saved(experiment: Experiment, folder: RunFolder) -> Callable[[int, Progress, TrainState], TrainState]:
    """Return the function `as_saved` of `runs.checkpoint.Checkpoints`.

    Optax's state is a tree of the chain's transformations. One without arrays, such as a limit of the gradient's norm, changes the tree alone.
    """

    def as_saved(step: int, progress: Progress, shapes: TrainState) -> TrainState:
        before, here = _config_of(folder, step, progress), flat(experiment.config)
        if not any(covers(["optimizer"], key) for key in config_lib.differences(before, here)):
            return shapes
        tree = jax.tree.structure(optimizer_state(experiment, before, shapes))
        return shapes.replace(opt_state=jax.tree.unflatten(tree, jax.tree.leaves(shapes.opt_state)))

    return as_saved


def _config_of(folder: RunFolder, step: int, progress: Progress) -> Flat:
    """Return the config that a checkpoint was trained with. Those of earlier versions do not have it; the manifest then says what has changed since."""
    return flat(progress.config) if progress.config is not None else stored_at(folder, step)


# Taking a checkpoint up


@dataclasses.dataclass(frozen=True)
class TakenUp:
    """A checkpoint as the present config goes on from it.

    Attributes:
      experiment: with the length that follows from the checkpoint.
      progress: of the checkpoint, as far as it holds for the present config.
      offset: of the training batches; see `data.loader.TrainingBatches`.
      config: the present config, as JSON values.
      changes: entries of the manifest: those before the checkpoint, and what changes with it.
      lines: to print.
      reopened: whether the checkpoint was the end of the run, and the test after it does not hold any more.
      new_line: whether the next line of training metrics begins at this step.
    """

    experiment: Experiment
    progress: Progress
    offset: int
    config: dict
    changes: tuple[dict, ...]
    lines: tuple[str, ...]
    reopened: bool
    new_line: bool


def take_up(experiment: Experiment, folder: RunFolder, step: int, progress: Progress) -> TakenUp:
    """Return the checkpoint of a step, or a new run, as the config goes on from it. Writes only the lines of a test that is done again.

    Raises:
      ConfigError: the run is longer already than the config says, or the schedule does not fit.
    """
    # The first process reads, so that all decide from the same files.
    there = session.gather("taken up", _read(experiment, folder, step, progress) if session.is_first() else None)[0]
    config = json.loads(json.dumps(experiment.config))
    before, here = there["config"], flat(config)
    changed = config_lib.differences(before, here)
    touched = lambda *keys: any(covers(keys, key) for key in changed)  # noqa: E731
    notes: dict[str, str] = {}

    examples, batch_size = len(experiment.dataset.splits["train"]), experiment.loading.batch_size
    position = progress.position if progress.position is not None else step * before["data.batch_size"]
    if touched(*_ORDER) and position % examples:
        position = -(-position // examples) * examples
        note = "a new epoch begins: examples of the one before may come again, and others of it do not come"
        notes |= {key: note for key in changed if covers(_ORDER, key)}
    steps = count_steps(experiment.training, examples, batch_size, step, position)
    check_length(experiment, steps, step, there["saved"])
    experiment = with_steps(experiment, steps)
    if touched(*_RATE):
        note = _describe_rate(experiment, step, there["rate"])
        notes |= {key: note for key in changed if covers(_RATE, key)}

    lost = there["went_back"] == step and progress.best_step is not None and progress.best_step not in there["saved"]
    if touched("checkpoint.best") or lost:
        progress = dataclasses.replace(progress, **dict(zip(("best", "best_step", "without_improvement"), there["best"], strict=True)))
        notes["checkpoint.best"] = _describe_best(experiment, progress)
    was_finished, more = progress.finished, [notes["checkpoint.best"]] if lost else []
    if touched(*_ENDS):
        patience = experiment.evaluation.patience
        exhausted = experiment.checkpoint.best is not None and patience is not None and progress.without_improvement >= patience
        at_end = step == experiment.steps and progress.evaluated_at == step
        progress = dataclasses.replace(progress, finished=at_end or (was_finished and exhausted))
        if was_finished and exhausted and step < experiment.steps:
            more += [f"the run stays finished: {experiment.checkpoint.best} has not improved in {patience} evaluations. Raise evaluation.patience to go on."]
    elif was_finished and any(covers(("optimizer", "data", "training", "model"), key) and not covers(_SETS, key) for key in changed):
        more += [f"the run has finished at step {step}: the change has no effect before training.steps is raised"]
    reopened = was_finished and (not progress.finished or touched("checkpoint.best"))
    if reopened and session.is_first():
        with disk.must_write(folder.path):
            tests = set_tests_aside(folder)
        more += [f"the run had finished; the results of its test are in {tests}"] if tests else []

    entries = [{"time": now(), "step": step, "key": key, "old": old, "new": new} for key, (old, new) in changed.items()]
    entries = [entry | ({"note": notes[entry["key"]]} if entry["key"] in notes else {}) for entry in entries]
    known = {_identity(entry): entry for entry in there["changes"]}  # also by a start that died before its first checkpoint
    entries = [*_entries_until(there["changes"], step, before), *(known.get(_identity(entry), entry) for entry in entries)]
    shown = {key: pair for key, pair in changed.items() if set(map(str, pair)) != {"None", ABSENT}}  # no sets at all, and then the first one
    lines = [f"from step {step} on, config.{key} is {new!r}; it was {old!r}" for key, (old, new) in shown.items()]
    return TakenUp(
        experiment=experiment,
        progress=progress,
        offset=position - step * batch_size,
        config=config,
        changes=tuple(entries),
        lines=(*lines, *dict.fromkeys((*notes.values(), *more))),
        reopened=reopened,
        new_line=touched("log.every"),
    )


def check_length(experiment: Experiment, steps: int, step: int, saved: Sequence[int]) -> None:
    """Raise ConfigError if a run of `steps` steps is longer already."""
    if step <= steps:
        return
    key = "steps" if experiment.training.steps else "epochs"
    earlier = [at for at in saved if at <= steps]
    back = f", or go back with --from_step to one of the checkpoints {', '.join(map(str, earlier))}" if earlier else ""
    length = f"config.training.{key}={getattr(experiment.training, key):g}" + (f" is {steps} steps" if key == "epochs" else "")
    raise ConfigError(f"{length}, but the run is at step {step} already. Give at least as much{back}.")


def _read(experiment: Experiment, folder: RunFolder, step: int, progress: Progress) -> dict[str, Any]:
    """Return what the first process reads from the run folder: the config up to the step, the last learning rate, and the best so far by `checkpoint.best`."""
    config = _config_of(folder, step, progress)
    lines = folder.metrics()
    rates = [[line["step"], line["learning_rate"]] for line in lines if line["split"] == "train" and line["step"] <= step and "learning_rate" in line]
    split = experiment.best[0] if experiment.best is not None else None
    evaluations = [line for line in lines if line["split"] == split and line["step"] <= progress.evaluated_at]
    saved = saved_steps(folder)
    found = {"config": config, "rate": rates[-1] if rates else None, "best": _best(experiment, evaluations, saved), "saved": saved}
    manifest = folder.manifest()
    return found | {"changes": manifest.get("changes", []), "went_back": (last_going_back(manifest) or {}).get("from_step")}


def _entries_until(entries: Sequence[Mapping], step: int, config: Flat) -> list[Mapping]:
    """Return the entries of the manifest that led to the config of a checkpoint. It may have been saved again, after changes at its own step."""
    known = {entry["key"]: number for number, entry in enumerate(entries) if entry["step"] == step and config.get(entry["key"], ABSENT) == entry["new"]}
    return [entry for number, entry in enumerate(entries) if entry["step"] < step or (entry["step"] == step and number <= known.get(entry["key"], -1))]


def _best(experiment: Experiment, evaluations: Sequence[Mapping], saved: Sequence[int]) -> tuple[float | None, int | None, int]:
    """Return the best value of `checkpoint.best`, its step, and the number of evaluations after it; only steps that have a checkpoint count."""
    metric, best, best_step, after = experiment.best[1] if experiment.best is not None else "", None, None, 0
    for line in evaluations:
        if line["step"] in saved and metric in line and experiment.task.is_better(metric, line[metric], best):
            best, best_step, after = line[metric], line["step"], 0
        elif best is not None:
            after += 1
    return best, best_step, after


def _describe_best(experiment: Experiment, progress: Progress) -> str:
    metric = experiment.checkpoint.best
    if metric is None:
        return "no best checkpoint is kept; the latest is tested"
    if progress.best_step is None:
        return f"no checkpoint that exists has a value of {metric}: the best begins with the next evaluation"
    return f"the best of the checkpoints that exist is that of step {progress.best_step}, with {metric} {progress.best:.4f}"


def _describe_rate(experiment: Experiment, step: int, last: Sequence | None) -> str:
    if step >= experiment.steps:
        return f"the run ends at step {step}"
    rate = float(experiment.schedule(jnp.asarray(step, jnp.int32)))
    after = f", after {last[1]:.4g} in step {last[0]}" if last else ""
    return f"from step {step} on, the learning rate follows the schedule of {experiment.steps} steps: {rate:.4g} in step {step + 1}{after}"


# The record


class Record(Callback):
    """Writes the changes of a run into its folder, right before the first metrics, checkpoint or result that they affect."""

    def __init__(self, folder: RunFolder):
        self._folder, self._write = folder, None

    def expect(self, up: TakenUp) -> None:
        """Prepare to write the changes of a checkpoint that was taken up, unless they are written."""
        manifest = self._folder.manifest()
        before, entries = manifest.get("changes", []), list(up.changes)
        values = {"steps": up.experiment.steps} | ({"changes": entries} if entries or before else {})
        if entries != before:  # else the data is the same, and need not be read for its checksum
            known = {split: entry for split, entry in manifest.get("data", {}).items() if is_named(split)}  # also of sets that are gone
            values["data"] = known | describe_data(up.experiment)
        if all(manifest.get(key) == value for key, value in values.items()) and self._folder.config() == up.config:
            return

        def write() -> None:
            with disk.must_write(self._folder.path):
                self._folder.update_manifest(**values)
                self._folder.write_config(up.config)

        self._write: Callable[[], None] | None = write

    def commit(self) -> None:
        """Write what is expected, once."""
        if self._write is not None:
            self._write()
            self._write = None

    def on_log(self, run, step, values):
        self.commit()

    def on_evaluate(self, run, step, split, values):
        self.commit()

    def on_save(self, run, step):
        self.commit()

    def on_end(self, run, result):
        if result is not None:
            self.commit()


def _identity(entry: Mapping[str, Any]) -> str:
    return json.dumps([entry[key] for key in ("step", "key", "old", "new")])
