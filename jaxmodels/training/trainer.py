"""The loop, the only one: batch, step, metrics; every so often evaluate and save."""

import contextlib
import dataclasses
import gc
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
from rich.console import Console

from jaxmodels.data import loader
from jaxmodels.errors import ConfigError, Diverged, Interrupted
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.experiment.sections import MACHINE_KEYS, resolve
from jaxmodels.hardware import compiler_options
from jaxmodels.models.functional import evaluation_model
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import pipeline
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.pretrained.folder import is_published
from jaxmodels.runs import shared_folder
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.checkpoint import Checkpoints, Progress, parse_run
from jaxmodels.runs.folder import RunFolder, now
from jaxmodels.step import metrics as metrics_lib
from jaxmodels.training import initialize as state_lib
from jaxmodels.training import throughput
from jaxmodels.training.clock import Clock, time_when_ready
from jaxmodels.training.compile import CompileRecord, compile_ahead, compile_train_step, own_device, use_persistent_cache
from jaxmodels.training.evaluation import Evaluator
from jaxmodels.training.log import Log
from jaxmodels.training.signals import StopSignals


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      workdir: the run's folder.
      step: the last step trained.
      evaluated_step: the step whose weights were tested: the best, where one is tracked, else the last.
      metrics: the final ones by split: `result.metrics["test"]["accuracy"]`.
      seconds: spent training, over all starts.
    """

    workdir: str
    step: int
    evaluated_step: int
    metrics: Mapping[str, Mapping[str, float]]
    seconds: float


def train(experiment: Experiment, workdir: str, *, overwrite: bool = False, planned: Any = None, console: Console | None = None) -> Result:
    """Trains an experiment in a folder, from where the folder's run stands to its end.

    Args:
      experiment: as `build_experiment` gives.
      workdir: the run's folder: made, or taken up again if it holds a run of the same config.
      overwrite: delete the run that is there.
      planned: a plan of this config for these devices, as `plan.measured.open_plan` returns: compared with the run; its executable is loaded
        in place of compiling where it is of this very step.
      console: where to print.

    Raises:
      ConfigError: the folder belongs to another config, `init_from` does not fit, the batch does not divide
        over the devices.
      Diverged: loss, gradients or update were not finite; the last good checkpoint is the latest.
      Interrupted: SIGTERM or SIGINT; everything is saved.
    """
    folder = RunFolder(workdir)
    changed = {}
    if overwrite:
        folder.check_writable()
        _check_dependents(folder)
    else:
        changed = folder.check(experiment.config, resolve, MACHINE_KEYS)
        if any(parent.get("merged") for parent in folder.manifest().get("parents", [])[:1]):
            raise ConfigError(f"{folder.path} holds merged weights, not a run to go on with: start from it with config.init_from in another --workdir.")
        _check_same_data(experiment, folder)
    if experiment.init_from and (overwrite or not folder.config_file.exists()):
        _check_parent(experiment, folder)
    with StopSignals() as stop:
        trainer = Trainer(experiment, folder, stop, console or Console(), planned)
        shared_folder.begin(folder, experiment.config, clear=overwrite)  # after all that could have refused the new run
        for key, (there, here) in changed.items():
            trainer.log.say(f"config.{key} is {here!r}; it was {there!r} when this run last started")
        try:
            return trainer.run()
        except Interrupted:
            raise Interrupted(trainer.stopped(stop.received)) from None
        finally:
            trainer.close()


class Trainer:
    """One start of a run."""

    def __init__(self, experiment: Experiment, folder: RunFolder, stop: StopSignals, console: Console, planned: Any = None):
        """Finds the devices and lays out the state on them; makes no array of it yet."""
        self.mesh = mesh_lib.make_mesh(experiment.mesh)
        layout = sharding_lib.make_layout(self.mesh, experiment.sharding, experiment.config["partition"])
        experiment = experiment.on(self.mesh.devices.flat[0].platform, layout)
        self.experiment, self.folder, self.stop = experiment, folder, stop
        self.main = jax.process_index() == 0
        mesh_lib.check_batch(experiment.loading.batch_size, experiment.training.accumulate, self.mesh, "data.batch_size", layout.microbatches)
        mesh_lib.check_batch(experiment.eval_batch_size, 1, self.mesh, "data.eval_batch_size", layout.microbatches)
        compiler_options.choose(experiment.config["compiler_options"], own_device(self.mesh))  # an error, now rather than when compiling
        self.shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
        root = jax.random.key(experiment.config["seed"])
        self.init_key, self.step_key, self.sample_key = (jax.random.fold_in(root, i) for i in range(3))
        self.evaluator = Evaluator(experiment, self.mesh, stop, self._record_compile)
        self.log = Log(console, experiment.steps, self._fallback, active=self.main)
        self.checkpoints: Checkpoints | None = None
        self.state = None
        self.progress = Progress()
        self.clock: Clock | None = None
        self.planned = planned
        self.usage: throughput.Usage | None = None
        self.comparison = None
        self.lines = []  # (step, split, metrics) of all starts
        self._sampler = None  # compiled when first used
        self._pending = None  # a training line whose numbers the device may not have reached

    def run(self) -> Result:
        """The whole way: start or resume, loop, test."""
        for note in self.experiment.dataset.notes:
            self.log.say(note, style="yellow" if note.startswith("warning") else "dim")
        for problem in (*self.experiment.dataset.fallbacks, use_persistent_cache()):
            if problem is not None:
                self._warn(problem)
        options = self.experiment.checkpoint
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            keep=options.keep,
            every=options.every,
            parents=lambda: {child["step"] for child in self.folder.children()},
            save_frozen=not self.experiment.frozen_in_parent,
        )
        self.state, self.progress, lines, record = self.stop.run(state_lib.start, self.experiment, self.folder, self.checkpoints, self.shapes, self.init_key)
        for line in lines:
            self.log.say(line, style="yellow" if line.startswith("warning") else None)
        step = int(self.state.step)
        for line in shared_folder.rewind(self.folder, step, self.progress):
            self.lines.append((line.pop("step"), line.pop("split"), line))
        self._write_manifest(step)
        if record is not None:
            self._record_compile(record)
        self.log.open(self.folder, step, self.experiment.log.tensorboard)
        if not self.progress.finished:
            self._loop(step)
        return self._finish()

    def _loop(self, step: int) -> None:
        """Steps until the end, a stop, or patience runs out."""
        experiment, total = self.experiment, self.experiment.steps
        source = experiment.dataset.splits["train"]
        sharding, rows = mesh_lib.batch_sharding(self.mesh), mesh_lib.local_rows(mesh_lib.batch_sharding(self.mesh), experiment.loading.batch_size)
        if self._evaluation_due(step) and self.progress.evaluated_at != step:
            # Stopped after this step was saved and before it was evaluated.
            self._evaluate(step)
            self._save(step)
        if step == total or self.progress.finished:
            return
        train_step = self._compile_step()
        self.usage = throughput.Usage(experiment, self.mesh)
        self._record_start(**self.usage.record)
        if self.planned is not None:
            if other := self.planned.differences(experiment.config, self.mesh):
                self._warn(f"this run is not compared with {self.planned.path}, which is the plan of another: {other}")
            else:
                self.comparison = self.planned.comparison(self.mesh)
        batches = loader.TrainingBatches(
            source,
            experiment.loading.batch_size,
            total,
            seed=experiment.config["seed"],
            shuffle=experiment.loading.shuffle,
            rows=rows,
            transform=experiment.transform,
        )
        stream = loader.read_ahead(batches, start=step, **experiment.reading(source))
        feed = loader.DeviceFeed(stream, lambda batch: self._place(batch, sharding))
        self.clock = Clock(step, self.progress.seconds)
        metrics = None
        with contextlib.closing(stream), _short_collections():
            while step < total and not self.progress.finished:
                with self.stop.may_raise(), self.clock.waiting(metrics):
                    batch = next(feed)
                started = time.perf_counter()
                self.state, metrics = train_step(self.state, batch, self.step_key)
                step += 1
                if self.comparison is not None and self.comparison.add(time_when_ready(metrics) - started):
                    self._compare()
                self._flush()  # the line before this step: its numbers are ready by now, or nearly
                if step % experiment.log.every == 0 or step == total:
                    self._pending = (step, metrics)
                self.log.tick(step)
                self.stop.check()
                if self._evaluation_due(step) or step % experiment.checkpoint.every == 0:
                    self._flush()
                    self._boundary(step)
        self._flush()
        if self.comparison is not None:  # a run of a few steps
            self._compare()

    def _compare(self) -> None:
        """Says and records, once, what of the first steps is far from their plan."""
        record, far = self.comparison.result()
        self.comparison = None
        self._record_start(plan=record)
        for line in far:
            self._warn(line)

    def _boundary(self, step: int) -> None:
        """Evaluates and saves at a step where either is due."""
        self._raise_if_diverged(int(self.state.diverged_at))
        with self.clock.paused():
            if self._evaluation_due(step):
                self._evaluate(step)
            if step % self.experiment.checkpoint.every == 0 or self.progress.finished or self._is_best(step):
                self._save(step)

    def _evaluation_due(self, step: int) -> bool:
        every = self.experiment.evaluation.every
        return step > 0 and (step == self.experiment.steps or (every is not None and step % every == 0))

    def _is_best(self, step: int) -> bool:
        return self.experiment.checkpoint.best is not None and self.progress.best_step == step

    def _evaluate(self, step: int) -> None:
        """Evaluates on the validation split where there is one, and moves the progress on."""
        progress = dataclasses.replace(self.progress, evaluated_at=step, finished=step == self.experiment.steps)
        source = self.experiment.dataset.splits.get("validation")
        if source is not None:
            values = self.evaluator.run(self.state.weights, self.state.stats, source)
            self._write(step, "validation", values)
            progress = self._judge(progress, step, values)
        self._sample(step)
        self.progress = progress

    def _judge(self, progress: Progress, step: int, values: Mapping[str, float]) -> Progress:
        """The progress after an evaluation: is it the best, and is it time to stop?"""
        best, patience = self.experiment.checkpoint.best, self.experiment.evaluation.patience
        if best is None:
            return progress
        if metrics_lib.is_better(best, values[best], progress.best):
            return dataclasses.replace(progress, best=values[best], best_step=step, without_improvement=0)
        progress = dataclasses.replace(progress, without_improvement=progress.without_improvement + 1)
        if patience is not None and progress.without_improvement >= patience and not progress.finished:
            self.log.say(f"stopping early: {best} has not improved in {patience} evaluations; best {progress.best:.4f} at step {progress.best_step}")
            progress = dataclasses.replace(progress, finished=True)
        return progress

    def _sample(self, step: int) -> None:
        """Shows a text that the model makes up, where the task and the data have one to show."""
        task = self.experiment.task
        if not getattr(task, "sample_length", 0) or getattr(task, "tokenizer", None) is None:
            return
        arguments = (self.state.weights, self.state.stats, jax.random.fold_in(self.sample_key, step))
        if self._sampler is None:
            graph, layout = self.experiment.graph, dataclasses.replace(self.experiment.evaluation_layout, left_whole={})

            def sample(params, stats, key):
                with layout_lib.use(layout):
                    return task.sample(evaluation_model(graph, params, stats), key)

            everywhere = mesh_lib.replicated(self.mesh)
            self._sampler, record = self.stop.run(lambda: compile_ahead("sample", sample, *arguments, out_shardings=everywhere))
            self._record_compile(record)
        self.log.text(step, "sample", task.tokenizer.decode(jax.device_get(self._sampler(*arguments))))

    def _save(self, step: int) -> None:
        self._raise_if_diverged(int(self.state.diverged_at))
        if self.clock is not None:
            self.progress = dataclasses.replace(self.progress, seconds=self.clock.total())
        self.checkpoints.save(self.state, self.progress)

    def _place(self, batch, sharding):
        """A batch on the devices; for pmap with a dimension of devices in front."""
        size = self.experiment.loading.batch_size
        if self.experiment.layout.axis:
            rows, size = size // self.mesh.size, self.mesh.size
            batch = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)
        return mesh_lib.place(batch, sharding, size)

    def _compile_step(self):
        saved = self.planned.saved if self.planned is not None else None
        arguments = (self.experiment, self.mesh, self.shapes, self.state, self.step_key, saved)
        step, record = self.stop.run(lambda: compile_train_step(*arguments))
        self._record_compile(record)
        layout = self.experiment.layout
        for note in (*sharding_lib.replicated_notes(self.shapes, self.experiment.sharding, layout), *sharding_lib.notes(layout)):
            self._warn(note)
        return step

    def _flush(self) -> None:
        """Writes the training line that is due. Waits for the device to reach its step, not further."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = metrics_lib.values(metrics)
        self._raise_if_diverged(int(values.pop("diverged_at")))
        rates = self.clock.rates(step, self.experiment.loading.batch_size)
        self._write(step, "train", self.experiment.task.summarize(values) | rates | self.usage.rates(rates["steps_per_second"]))

    def _write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """A line of metrics, to the log and to the result."""
        values = dict(values) | self.experiment.dataset.skipped_metric(split)
        self.lines.append((step, split, values))
        self.log.write(step, split, values)

    def _raise_if_diverged(self, at: int) -> None:
        if at:
            self.checkpoints.wait()
            good = self.checkpoints.steps()
            where = f"the latest good checkpoint is step {good[-1]}" if good else "no checkpoint was written before"
            raise Diverged(
                f"diverged at step {at}: loss, gradients or update are not finite; {where}. Try a lower learning_rate, a longer schedule.warmup, or clip_norm.",
                at,
            )

    def stopped(self, signal_name: str) -> str:
        """Saves what there is after a signal; says what was saved."""
        again = "The same command goes on from there."
        if self.state is None:
            return f"{signal_name}: stopped before anything was trained. {again}"
        self._flush()
        step = int(self.state.step)
        if step not in self.checkpoints.steps():
            self._save(step)
        self.checkpoints.wait()
        return f"{signal_name}: saved {self.checkpoints.folder / str(step)}. {again}"

    def _finish(self) -> Result:
        """Test the best weights, or the last, once, and return the final metrics."""
        step = int(self.state.step)
        self.checkpoints.wait()
        source = self.experiment.dataset.splits.get("test")
        tested = next((at for at, split, _ in self.lines if split == "test"), None)
        if tested is None:
            tested = self._step_to_test(step)
            if source is not None:
                params, stats = self.state.weights, self.state.stats
                if tested != step:
                    located = weights_lib.locate(f"{self.folder.path}@{tested}")
                    params, stats = self.stop.run(weights_lib.read_model, located, self.shapes.weights, self.shapes.stats)
                self._write(tested, "test", self.evaluator.run(params, stats, source))
        final = {}
        for at, split, values in self.lines:
            if split != "validation" or at == tested:
                final[split] = values
        return Result(str(self.folder.path), step, tested, final, self.progress.seconds)

    def _step_to_test(self, latest: int) -> int:
        """Return the best step, or the latest where none is tracked or where the best one's checkpoint is gone, which is a warning."""
        best = self.progress.best_step
        if best is None:
            return latest
        if best in self.checkpoints.steps():
            return best
        self._warn(f"the checkpoint of the best step, {best}, is gone from {self.checkpoints.folder}: the latest, of step {latest}, is tested in its place")
        return latest

    def close(self) -> None:
        """Ends writers and threads; what is being saved is finished first."""
        self.log.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    # The manifest

    def _warn(self, message: str) -> None:
        """A line, and an entry of the manifest."""
        self.log.say("warning: " + message, style="yellow")
        self._fallback(message)

    def _fallback(self, message: str) -> None:
        if self.main:
            self.folder.add_to_manifest("fallbacks", message)

    def _record_compile(self, record: CompileRecord) -> None:
        how = f"loaded from {record.loaded}" if record.loaded else "loaded from the cache" if record.cached else "compiled"
        if record.not_loaded:
            self._warn(f"{record.name}: {self.planned.saved.folder} is not loaded: {record.not_loaded}; it is compiled here")
        given = ", ".join(f"{name}={value}" for name, value in record.options.items())
        self.log.say(f"{record.name}: {how} in {record.seconds:.1f} s{' with ' + given if given else ''}", style="dim")
        for name, reason in record.rejected.items():
            self._warn(f"the compiler option {name} is left out: this compiler says: {reason}")
        if self.main:
            entry = {key: value for key, value in dataclasses.asdict(record).items() if value not in (None, {})}
            self._record_start(compiled=self.folder.manifest()["starts"][-1]["compiled"] | {record.name: entry})

    def _record_start(self, **values) -> None:
        """Sets keys of this start's entry in the manifest."""
        if self.main and values:
            starts = self.folder.manifest()["starts"]
            starts[-1] |= values
            self.folder.update_manifest(starts=starts)

    def _write_manifest(self, step: int) -> None:
        """What this start runs on."""
        if not self.main:
            return
        trained, frozen = (sum(x.size for x in jax.tree.leaves(part)) for part in (self.shapes.params, self.shapes.frozen))
        devices = self.mesh.devices.flatten()
        start = {
            "time": now(),
            "from_step": step,
            "python": platform.python_version(),
            "packages": {p: metadata.version(p) for p in ("jaxmodels", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")},
            "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
            "processes": jax.process_count(),
            "mesh": dict(self.mesh.shape),
            "compiled": {},
        }
        for part, used in self.experiment.kernels.items():
            start[part] = used
            self.log.say(f"{part}: {used['used']} ({used['why']})", style="dim")
        if (stages := self.mesh.shape["pipeline"]) > 1:
            microbatches = self.experiment.layout.microbatches
            start["pipeline"] = {"stages": stages, "microbatches": microbatches, "bubble": pipeline.bubble(stages, microbatches)}
            self.log.say(f"pipeline: {pipeline.describe(stages, microbatches)}", style="dim")
        manifest = self.folder.manifest()
        self.folder.update_manifest(
            parameters=trained + frozen,
            trained_parameters=trained,
            steps=self.experiment.steps,
            data=_describe_data(self.experiment),
            info={key: value for key, value in self.experiment.dataset.info.items() if key != "tokenizer"},
            skipped_examples=dict(self.experiment.dataset.skipped),
            parents=manifest.get("parents", []),
            fallbacks=manifest.get("fallbacks", []),
            starts=[*manifest.get("starts", []), start],
        )
        tokenizer = self.experiment.dataset.info.get("tokenizer")
        if tokenizer is not None:
            self.folder.tokenizer_file.write_text(tokenizer.to_json(), encoding="utf-8")
        share = f", {trained:,} of them trained ({trained / (trained + frozen):.2%})" if frozen else ""
        self.log.say(f"{trained + frozen:,} parameters{share} on {start['devices']}; run folder {self.folder.path}")


@contextlib.contextmanager
def _short_collections():
    """Inside, Python's garbage collector leaves alone what exists now: the traces of compiling are many objects, and a
    pass over them stops a loop for a fifth of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _check_parent(experiment: Experiment, folder: RunFolder) -> None:
    """The weights to begin with fit, and are not those of a run that is about to be deleted."""
    if not is_published(experiment.init_from.run) and RunFolder(parse_run(experiment.init_from.run)[0]).path.resolve() == folder.path.resolve():
        raise ConfigError("config.init_from names the run's own folder. Choose another --workdir.")
    state_lib.check_parent(experiment)


def _check_dependents(folder: RunFolder) -> None:
    """A run is not deleted while another one's weights lie in it."""
    if dependents := folder.dependents():
        names = ", ".join(map(str, dependents))
        raise ConfigError(f"--overwrite: {folder.path} holds weights of {names}, which saved only what it trained. Delete that run first, or merge it.")


def _check_same_data(experiment: Experiment, folder: RunFolder) -> None:
    """A run goes on with the data it began with."""
    before, now = folder.manifest().get("data"), _describe_data(experiment)
    if before is not None and before != now:
        raise ConfigError(f"the data of this run has changed: {before} when it began, {now} now. Bring it back, or --overwrite.")
    tokenizer = experiment.dataset.info.get("tokenizer")
    if tokenizer is not None and folder.tokenizer_file.is_file() and folder.tokenizer_file.read_text(encoding="utf-8") != tokenizer.to_json():
        raise ConfigError(f"the data of this run has changed: it makes another tokenizer than {folder.tokenizer_file}. Bring it back, or --overwrite.")


def _describe_data(experiment: Experiment) -> dict:
    """Examples in each split, and the checksum of those that lie in memory."""
    parts = experiment.dataset.splits.items()
    return {name: {"examples": len(part)} | ({"crc32": part.fingerprint()} if hasattr(part, "fingerprint") else {}) for name, part in parts}
