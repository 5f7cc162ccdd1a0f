"""The training loop: batch, step, callbacks, log, evaluate, save."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from jaxmodels.data import evaluation_sets
from jaxmodels.distributed import session
from jaxmodels.errors import Diverged, Interrupted, RunError
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.hardware import compiler_options
from jaxmodels.hardware.malloc import short_collections
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.runs import going_back, shared_folder
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.runs.folder import RunFolder
from jaxmodels.step import metrics as metrics_lib
from jaxmodels.training import changes, initialize, saving
from jaxmodels.training import hooks as hooks_lib
from jaxmodels.training.batches import training_batches
from jaxmodels.training.clock import Clock
from jaxmodels.training.compile import compile_train_step, own_device, use_persistent_cache
from jaxmodels.training.evaluation import Evaluator
from jaxmodels.training.manifest import Manifest
from jaxmodels.training.preflight import check_run_folder
from jaxmodels.training.result import Result
from jaxmodels.training.samples import Samples
from jaxmodels.training.signals import StopSignals
from jaxmodels.training.terminal import Terminal
from jaxmodels.training.throughput import Throughput
from jaxmodels.training.trackers import make_trackers


def train(
    experiment: Experiment,
    workdir: str,
    *,
    overwrite: bool = False,
    allow_change: Sequence[str] = (),
    from_step: int | None = None,
    callbacks: Sequence[Any] = (),
    executable: Any = None,
    console: Console | None = None,
    stop: StopSignals | None = None,
) -> Result:
    """Train an experiment in a run folder, from where its run stands to its end.

    Args:
      experiment: as `build_experiment` returns.
      workdir: the run folder: created, or resumed if it holds a run of the same config, or of one that may change (`experiment.changeable`).
      overwrite: delete the run that is there.
      allow_change: keys whose values may differ from those of the run, in addition to those that always may.
      from_step: go back to the checkpoint of this step; later ones are moved aside. The same call again does not go back again.
      callbacks: called in addition to those of the config; see `training.callback`.
      executable: a compiled train step to load instead of compiling, where it is of the same program; see `training.executable.Saved`.
      console: where to print.
      stop: the signals that stop the run, and its watchdog; SIGTERM and SIGINT, and no watchdog, by default.

    Raises:
      ConfigError: the folder belongs to another config, there is no checkpoint of `from_step`, `init_from` does not fit, or the batch does not
        divide over the devices.
      RunError: another start is training in this folder.
      Diverged: loss, gradients or update were not finite; the last good checkpoint is the latest.
      Interrupted: a signal; everything is saved.
      ReadError, BadExample: an example cannot be read; everything is saved.
      OneFailed: in all of several processes, that one of them could not read an example; everything is saved.
    """
    folder = RunFolder(workdir)
    callbacks = [*map(hooks_lib.check_callback, callbacks), *hooks_lib.make_callbacks(experiment.config["callbacks"])]
    console = console or Console()
    with stop or StopSignals() as stop, shared_folder.locked(folder, stop, console.print) as lock:
        from_step, lines = check_run_folder(experiment, folder, overwrite, allow_change, from_step)
        trainer = Trainer(experiment, folder, stop, console, callbacks, executable, lock)
        for problem in shared_folder.begin(folder, experiment.config, clear=overwrite):  # after all that could have refused the new run
            trainer.manifest.warn(problem)
        for line in lines if from_step is None else [going_back.go_back(folder, from_step)]:
            trainer.terminal.say(line)
        try:
            return trainer.run()
        except Interrupted:
            if stop.watchdog.reason:
                raise RunError(f"{stop.watchdog.reason}. {trainer.save_now()}") from None
            raise Interrupted(f"{stop.received}: {trainer.save_now()}") from None
        except RunError as error:
            if not error.state_is_good:
                raise
            saved = trainer.save_now()
            if stop.received and session.current() is None:  # the signal ended the processes that were reading, too
                raise Interrupted(f"{stop.received}: {saved}") from None
            trainer.terminal.say(saved)
            raise
        finally:
            trainer.close()


class Trainer:
    """One start of a run."""

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        stop: StopSignals,
        console: Console,
        callbacks: Sequence[Any] = (),
        executable: Any = None,
        lock: Any = None,
    ):
        """Find the devices and lay out the state on them. Allocates no array of the state yet. `lock` is the first callback."""
        mesh_lib.run_large_steps_here(experiment.state_shapes())
        self.mesh = mesh_lib.make_mesh(experiment.mesh)
        layout = sharding_lib.make_layout(self.mesh, experiment.sharding, experiment.config["partition"])
        experiment = experiment.on(self.mesh.devices.flat[0].platform, layout)
        self.experiment, self.folder, self.stop, self.executable = experiment, folder, stop, executable
        self.may_write = (lambda: None) if lock is None else lock.check
        mesh_lib.check_batch(experiment.loading.batch_size, experiment.training.accumulate, self.mesh, "data.batch_size", layout.microbatches)
        mesh_lib.check_batch(experiment.eval_batch_size, 1, self.mesh, "data.eval_batch_size", layout.microbatches)
        compiler_options.choose(experiment.config["compiler_options"], own_device(self.mesh))  # an error, now rather than when compiling
        self.shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
        root = jax.random.key(experiment.config["seed"])
        self.init_key, self.step_key, sample_key = (jax.random.fold_in(root, i) for i in range(3))
        main = jax.process_index() == 0
        self.terminal = Terminal(console, experiment.steps, experiment.shown, lambda message: self.manifest.fallback(message), active=main)
        self.manifest = Manifest(folder, self.terminal.say, active=main)
        self.evaluator = Evaluator(experiment, self.mesh, stop, self.manifest.compiled)
        self.record = changes.Record(folder)
        outputs = [self.terminal, *make_trackers(experiment.log.tracker_entries), Samples(sample_key, stop, self.manifest.compiled)]
        self.hooks = hooks_lib.Hooks(
            experiment,
            folder,
            self.mesh,
            [*([] if lock is None else [lock]), self.record, Throughput(), *callbacks],
            outputs,
            say=self.terminal.say,
            warn=self.manifest.warn,
            record=self.manifest.record,
        )
        self.checkpoints: Checkpoints | None = None
        self.saver: saving.Saver | None = None
        self.state = None
        self.progress = Progress()
        self._offset, self._config = 0, None  # of the training batches; of each checkpoint
        self.clock: Clock | None = None
        self.lines = []  # (step, split, metrics) of all starts
        self._pending = None  # a log line whose values the device may not have computed yet
        self._result: Result | None = None

    def run(self) -> Result:
        """Start or resume, train, test."""
        for note in (*self.experiment.dataset.guesses, *self.experiment.dataset.notes):
            self.terminal.say(note, style="yellow" if note.startswith("warning") else "dim")
        for problem in (*self.experiment.dataset.fallbacks, use_persistent_cache()):
            if problem is not None:
                self.manifest.warn(problem)
        step = self._start()
        if not self.progress.finished:
            self._loop(step)
        elif self._ended:
            self._save(step)
        self._result = self._finish()
        return self._result

    def _start(self) -> int:
        """Initialise or restore the state; start the callbacks. Returns the step."""
        self.checkpoints, self.saver = saving.open_checkpoints(self.experiment, self.folder, self.shapes, self.terminal.say, self.stop.watchdog, self.may_write)
        self.state, self.progress, lines, record = self.stop.run(initialize.start, self.experiment, self.folder, self.checkpoints, self.shapes, self.init_key)
        for line in lines:
            self.terminal.say(line, style="yellow" if line.startswith("warning") else None)
        step = int(self.state.step)
        up = self._take_up(step)
        for line in shared_folder.rewind(self.folder, step, dataclasses.replace(self.progress, finished=self.progress.finished and not up.reopened)):
            self.lines.append((line.pop("step"), line.pop("split"), line))
        self.manifest.start(self.experiment, self.mesh, self.shapes, step)
        if record is not None:
            self.manifest.compiled(record)
        self.hooks.state, self.hooks.step, self.hooks.resumed = self.state, step, step > 0
        self.hooks.start(self.progress)
        return step

    def _take_up(self, step: int) -> changes.TakenUp:
        """Go on from the checkpoint with the present config, which may differ from its own."""
        up = changes.take_up(self.experiment, self.folder, step, self.progress)
        self.experiment = self.hooks.experiment = up.experiment
        self.terminal.total = up.experiment.steps
        self._ended = up.progress != self.progress  # by the present config; the checkpoint does not say so
        self.progress, self._offset, self._config = up.progress, up.offset, up.config
        if up.new_line:
            shardings = jax.tree.map(lambda x: x.sharding, self.state.metrics)
            self.state = self.state.replace(metrics=jax.jit(metrics_lib.zeros, out_shardings=shardings)(self.state.metrics))
        for line in up.lines:
            self.terminal.say(line)
        if session.is_first():
            self.record.expect(up)
        return up

    def _loop(self, step: int) -> None:
        """Train until the last step, a stop, or the end of patience."""
        total, log_every, save_every = self.experiment.steps, self.experiment.log.every, self.experiment.checkpoint.every
        if self._evaluation_due(step) and self.progress.evaluated_at != step:
            # Stopped after this step was saved and before it was evaluated.
            self._evaluate(step)
            self._save(step)
        if step == total or self.progress.finished:
            return
        train_step, stream, feed = self._compile_step(), *training_batches(self.experiment, self.mesh, self.stop, step, self._offset)
        self.clock = Clock(step, self.progress.seconds)
        metrics = None
        with stream, short_collections():
            while step < total and not self.progress.finished:
                with self.clock.waiting(metrics):
                    batch = feed.next(metrics)
                self.hooks.begin_step()
                self.state, metrics = train_step(self.state, batch, self.step_key)
                step += 1
                self.hooks.state, self.hooks.step = self.state, step
                self.hooks.dispatch("on_step", step, metrics)
                self._flush()  # the line before this step: its numbers are ready by now, or nearly
                log_due = step % log_every == 0 or step == total
                if log_due:
                    self._pending = (step, metrics)
                boundary = self._evaluation_due(step) or step % save_every == 0
                asked_to_save, asked_to_stop = self.hooks.requests(agree=log_due or boundary)
                asked_to_save = (log_due and self.saver.is_due()) or asked_to_save
                if boundary or asked_to_save or asked_to_stop:
                    self._flush()
                    self._evaluate_and_save(step, asked_to_save, asked_to_stop)
        self._flush()

    def _compile_step(self):
        arguments = (self.experiment, self.mesh, self.shapes, self.state, self.step_key, self.executable)
        step, record = self.stop.run(lambda: compile_train_step(*arguments))
        self.manifest.compiled(record, self.executable)
        layout = self.experiment.layout
        for note in (*sharding_lib.replicated_notes(self.shapes, self.experiment.sharding, layout), *sharding_lib.notes(layout)):
            self.manifest.warn(note)
        return step

    # Evaluating and saving

    def _evaluate_and_save(self, step: int, asked_to_save: bool, asked_to_stop: bool) -> None:
        """Evaluate and save, each if it is due or requested."""
        self._raise_if_diverged(int(self.state.diverged_at))
        with self.clock.paused():
            if self._evaluation_due(step) or asked_to_stop:
                self._evaluate(step)
                save, stop = self.hooks.requests(agree=True)  # a callback may have requested these after the evaluation
                asked_to_save, asked_to_stop = asked_to_save or save, asked_to_stop or stop
            if asked_to_stop and not self.progress.finished:
                self.terminal.say(f"stopping early: {self.hooks.stop_reason}")
                self.progress = dataclasses.replace(self.progress, finished=True)
            best = self.experiment.checkpoint.best is not None and self.progress.best_step == step
            if step % self.experiment.checkpoint.every == 0 or self.progress.finished or best or asked_to_save:
                self._save(step)

    def _evaluation_due(self, step: int) -> bool:
        every = self.experiment.evaluation.every
        return step > 0 and (step == self.experiment.steps or (every is not None and step % every == 0))

    def _evaluate(self, step: int) -> None:
        """Evaluate the validation split, if there is one, and the further validation sets; update the progress."""
        progress = dataclasses.replace(self.progress, evaluated_at=step, finished=step == self.experiment.steps)
        splits = evaluation_sets.of(self.experiment.dataset.splits, "validation")
        if "validation" not in splits:
            self.hooks.metrics("on_evaluate", step, "validation", values={})
        found = {}
        for split in splits:
            found[split] = self._write(step, split, self.evaluator.run(self.state.weights, self.state.stats, self.experiment.dataset.splits[split]))
        patience = self.experiment.evaluation.patience
        if self.experiment.best is not None:
            split, metric = self.experiment.best
            value = found[split][metric]
            progress = progress.after(step, value, self.experiment.task.is_better(metric, value, progress.best), patience)
            if progress.finished and step != self.experiment.steps:
                shown = f"best {progress.best:.4f} at step {progress.best_step}"
                self.terminal.say(f"stopping early: {self.experiment.checkpoint.best} has not improved in {patience} evaluations; {shown}")
        self.progress = progress

    def _save(self, step: int) -> None:
        self._raise_if_diverged(int(self.state.diverged_at))
        self.hooks.dispatch("on_save", step)
        seconds = self.clock.total() if self.clock is not None else self.progress.seconds
        position = self._offset + step * self.experiment.loading.batch_size
        self.progress = dataclasses.replace(self.progress, seconds=seconds, callbacks=self.hooks.states(), position=position, config=self._config)
        self.saver.save(self.state, self.progress)

    # Metrics

    def _flush(self) -> None:
        """Write the training line that is due. Waits for the device to reach its step, not further."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = metrics_lib.values(metrics)
        self._raise_if_diverged(int(values.pop("diverged_at")))
        self._write(step, "train", dict(self.experiment.task.summarize(values)) | self.clock.rates(step, self.experiment.loading.batch_size))

    def _write(self, step: int, split: str, values: Mapping[str, float]) -> dict[str, float]:
        """Hand a line of metrics to the callbacks, and keep it for the result."""
        values = dict(values) | self.experiment.dataset.skipped_metric(split)
        event = ("on_log", step) if split == "train" else ("on_evaluate", step, split)
        values = self.hooks.metrics(*event, values=values)
        self.lines.append((step, split, values))
        return values

    def _raise_if_diverged(self, at: int) -> None:
        if at:
            self.saver.settle()
            good = self.checkpoints.steps()
            where = f"the latest good checkpoint is step {good[-1]}" if good else "no checkpoint was written before"
            raise Diverged(
                f"diverged at step {at}: loss, gradients or update are not finite; {where}. Try a lower learning_rate, a longer schedule.warmup, or clip_norm.",
                at,
            )

    # The end

    def save_now(self) -> str:
        """Save the state after a signal or an error outside the step. Return the message to end with."""
        if self.state is None:
            return "stopped before the first training step. The same command starts it again."
        self._flush()
        step = int(self.state.step)
        self.saver.finish(step, lambda: self._save(step), attempts=3)
        return f"saved {self.checkpoints.folder / str(step)}. The same command resumes the run."

    def _finish(self) -> Result:
        """Test the best weights, or the last, once on each test set. Return the result."""
        step = int(self.state.step)
        self.saver.finish(step, lambda: self._save(step), attempts=5)
        done = {split: at for at, split, _ in self.lines if evaluation_sets.main_of(split) == "test"}
        waiting = [split for split in evaluation_sets.of(self.experiment.dataset.splits, "test") if split not in done]
        tested = next(iter(done.values()), None)
        if waiting or tested is None:
            tested = saving.step_to_test(self.progress, self.checkpoints, step, self.manifest.warn)
        if waiting:
            params, stats = self.state.weights, self.state.stats
            if tested != step:
                located = weights_lib.locate(f"{self.folder.path}@{tested}")
                params, stats = self.stop.run(weights_lib.read_model, located, self.shapes.weights, self.shapes.stats)
            for split in waiting:
                self._write(tested, split, self.evaluator.run(params, stats, self.experiment.dataset.splits[split]))
        final = {split: values for at, split, values in self.lines if evaluation_sets.main_of(split) != "validation" or at == tested}
        return Result(str(self.folder.path), step, tested, final, self.progress.seconds)

    def close(self) -> None:
        """End callbacks, trackers and threads, after the last save is finished."""
        try:
            self.hooks.end(self._result)
        finally:
            if self.saver is not None:
                self.saver.close()
