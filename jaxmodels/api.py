"""The commands as functions: train, evaluate, and load a run back to predict with it, or to make texts."""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from jaxmodels.allocator import keep_freed_memory
from jaxmodels.data import tokenizers
from jaxmodels.errors import ConfigError, Interrupted
from jaxmodels.experiment import build_experiment, build_model
from jaxmodels.inference.generate import Completion, Generator, Prompt
from jaxmodels.interop.as_run import as_run
from jaxmodels.interop.folder import is_published
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.parallel.layout import Layout
from jaxmodels.plan.report import Plan, make_plan
from jaxmodels.training import step as step_lib
from jaxmodels.training import trainer
from jaxmodels.training import weights as weights_lib
from jaxmodels.training.checkpoint import parse_run
from jaxmodels.training.evaluation import Evaluator
from jaxmodels.training.run_folder import RunFolder
from jaxmodels.training.signals import StopSignals

Arrays = Mapping[str, Mapping[str, np.ndarray]]


def train(
    config: Mapping,
    workdir: str,
    *,
    data: Arrays | None = None,
    data_dir: str | None = None,
    overwrite: bool = False,
    plan: str | None = None,
    quiet: bool = False,
) -> trainer.Result:
    """Trains a config in a folder, or goes on with the run of it that is there.

    For the whole process it sets JAX's compilation cache (`training.compile`) and how freed memory is kept (`allocator`).

    Args:
      config: as `load_config` gives, or nested dictionaries.
      workdir: the run's folder.
      data: arrays by split, for `data.source = "arrays"`: `{"train": {"image": …, "label": …}, "test": …}`.
      data_dir: the data directory; `JAXMODELS_DATA_DIR` if None.
      overwrite: delete the run that is in the folder.
      plan: a plan of this config for these devices, to load and to compare with; see `trainer.train`.
      quiet: print nothing.

    Raises:
      ConfigError, Diverged, Interrupted: see jaxmodels.errors.
    """
    keep_freed_memory()
    experiment = build_experiment(config, data_dir=data_dir, data=data)
    return trainer.train(experiment, workdir, overwrite=overwrite, plan=plan, console=Console(quiet=quiet))


def plan(config: Mapping, topology: str, *, data: Arrays | None = None, data_dir: str | None = None) -> Plan:
    """What a config takes of chips that are not here: memory, time, cost.

    Args:
      config: as `load_config` gives, or nested dictionaries.
      topology: such as `v5p-128`, `v5p:4x4x4`, `4xv5p-128` or `h100x8`; see `plan.topology.parse`.
      data, data_dir: as for `train`.

    Raises:
      ConfigError: the topology is none, or mesh, batch or a kernel does not fit it.
      plan.topology.DoesNotFit: the step needs more memory than a device has; says how much, and what to change.
      RunError: the compiler failed.
    """
    return make_plan(build_experiment(config, data_dir=data_dir, data=data), topology)


def evaluate(run: str, *, split: str = "test", data: Arrays | None = None, data_dir: str | None = None) -> dict[str, Any]:
    """Metrics of a run's weights (their moving average, where it kept one) on a split.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`; RUN alone is its best checkpoint where it kept one, else its latest.
      split: of the run's data.
      data, data_dir: as for `train`.

    Returns:
      The metrics, with the `step` of the weights and the `seconds` it took.

    Raises:
      ConfigError: no such run, checkpoint or split.
    """
    located = weights_lib.locate(run)
    folder = located.folder
    try:
        experiment = build_experiment(_for_any_platform(folder.config()), data_dir=data_dir, data=data, trained_info=_trained_info(folder))
        if split not in experiment.dataset.splits:
            raise ConfigError(f"--split={split}: the data of {folder.path} has {', '.join(experiment.dataset.splits)}.")
        # All devices there are, however many trained it; a padded batch may be larger than asked.
        mesh = _fitting_mesh(experiment.mesh, experiment.sharding, experiment.state_shapes())
        layout = sharding_lib.make_layout(mesh, experiment.sharding)
        ways = mesh_lib.batch_ways(mesh) * layout.microbatches
        loading = dataclasses.replace(experiment.loading, eval_batch_size=-(-experiment.eval_batch_size // ways) * ways)
        experiment = dataclasses.replace(experiment, loading=loading).on(mesh.devices.flat[0].platform, layout)
        shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
        with StopSignals() as stop:
            params, stats = stop.run(weights_lib.read_model, located, shapes.weights, shapes.stats)
            values = Evaluator(experiment, mesh, stop).run(params, stats, experiment.dataset.splits[split])
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped evaluating; there is nothing to save.") from None
    return {"step": located.step} | values | experiment.dataset.skipped_metric(split)


class Run:
    """A trained run, loaded.

    Attributes:
      model: the Flax module with its weights, in evaluation mode.
      task: what it learned.
      config: resolved.
      step: of the weights.
      tokenizer: of a text run, or None.
      layout: how the model is spread over devices; None for one.
    """

    def __init__(self, model: nnx.Module, task: Any, config: dict, step: int, tokenizer, layout: Layout | None = None):
        self.model, self.task, self.config, self.step, self.tokenizer, self.layout = model, task, config, step, tokenizer, layout
        graph, params, stats = step_lib.split(model)
        self._weights = (params, stats)
        self._predict = jax.jit(lambda params, stats, batch: task.predict(step_lib.evaluation_model(graph, params, stats), batch))

    def predict(self, batch: Mapping[str, np.ndarray]) -> Any:
        """What the model says of a batch, as the task's own `predict` gives it.

        Args:
          batch: arrays with B rows, of what the model reads; text goes through `run.tokenizer.encode`, padded with -1.

        Returns:
          By task: `classify`, of `image` [B, H, W, C], and `classify_text`, of `tokens` [B, T]: class probabilities [B, C].
          `language_model`, of `tokens`: log-probabilities of what follows each [B, T, V]; `masked_lm`: of what is at each place.
          `tag`, of `tokens`: the tags' numbers [B, T], names in `run.task.names`. `regress_text`, of `tokens`: numbers [B].
          `seq2seq`, of `source` [B, S]: decoded tokens [B, U], which `run.task.text(row)` makes a text of.
          `forecast`, of `past` [B, L, V]: [B, H, V].
        """
        return jax.tree.map(np.asarray, self._predict(*self._weights, dict(batch)))

    def generate(self, prompts: Prompt | Sequence[Prompt], *, precision: str = "float32", **options: Any) -> list[Completion]:
        """Texts that the model makes of prompts: what follows them, or of a `seq2seq` run what they become.

        Args:
          prompts: a text or several, or lists of token numbers.
          precision: of the computation, `float32` or `bfloat16`.
          options: `max_tokens`, `temperature`, `top_k`, …, as `inference.generate.Options` has them.

        Raises:
          ConfigError: this run makes no texts; a prompt that is empty or does not fit; options that mean nothing.
        """
        return self._generator(precision).generate(prompts, **options)

    def stream(self, prompt: Prompt, *, precision: str = "float32", **options: Any) -> Iterator[str]:
        """The text of one prompt, in pieces as they come; arguments as of `generate`."""
        return self._generator(precision).stream(prompt, **options)

    @functools.lru_cache(maxsize=2)  # noqa: B019  a run is kept as long as its texts are made
    def _generator(self, precision: str) -> Generator:
        name = self.config["task"]["name"]
        if name not in ("language_model", "seq2seq"):
            raise ConfigError(
                f"a run of the task {name!r} makes no texts, those of 'language_model' and 'seq2seq' do; "
                "evaluate this one with jaxmodels evaluate, or ask jaxmodels.load(RUN).predict(batch)."
            )
        if precision not in step_lib.DTYPES:
            raise ConfigError(f"precision is {' or '.join(step_lib.DTYPES)}, got {precision!r}.")
        own = {"start": self.task.start, "ends": (self.task.end,)} if name == "seq2seq" else {}
        return Generator(self.model, self.tokenizer, dtype=step_lib.DTYPES[precision], layout=self.layout, **own)


def load(run: str, *, spread: bool = False) -> Run:
    """A run, or a published model, ready to predict and to make texts; needs no data.

    Args:
      run: as for `evaluate`; or `hf:FOLDER` or `hf:OWNER/NAME`, with the head that it was published with.
      spread: over all devices, as the run's own mesh says; otherwise it lies on the first.
    """
    opened = open_run(run)
    graph, params, stats = step_lib.split(opened.model)
    if spread:
        shapes, sharding = step_lib.weights_alone(params, stats), sharding_lib.Sharding(**opened.config["sharding"])
        mesh = _fitting_mesh(mesh_lib.MeshSizes(**opened.config["mesh"]), sharding, shapes)
        layout = sharding_lib.make_layout(mesh, sharding)
        shapes = sharding_lib.place_state(shapes, sharding, layout)
        params, stats = shapes.params, shapes.stats
    else:
        layout, here = None, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params, stats = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree) for tree in (params, stats))
    params, stats = weights_lib.read_model(opened.located, params, stats)
    model = step_lib.evaluation_model(graph, params, stats)
    return Run(model, opened.task, opened.config, opened.located.step, opened.info.get("tokenizer"), layout)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run, or a published model, none of whose weights are read yet.

    Attributes:
      config: resolved, without a wish for kernels that this machine may not have.
      info: what its data said of itself.
      task: what it learned.
      model: the module, of shapes instead of arrays.
      located: where its weights lie.
    """

    config: dict[str, Any]
    info: Mapping[str, Any]
    task: Any
    model: nnx.Module
    located: weights_lib.Located


def open_run(run: str) -> Opened:
    """What `load` makes a `Run` of, for those that read the weights in their own way; arguments and errors as there."""
    if is_published(run):
        config, info = as_run(run)
    else:
        folder = RunFolder(parse_run(run)[0])
        config, info = _for_any_platform(folder.config()), _trained_info(folder)
    task, build = build_model(config, info)
    model = nnx.eval_shape(lambda: build(nnx.Rngs(params=0)))
    _, params, stats = step_lib.split(model)
    if is_published(run):
        located = weights_lib.locate_whole(run, config["model"], step_lib.flatten(params) | step_lib.flatten(stats))
    else:
        located = weights_lib.locate(run)
    return Opened(config, info, task, model, located)


def _fitting_mesh(sizes: mesh_lib.MeshSizes, sharding: sharding_lib.Sharding, shapes: step_lib.TrainState) -> jax.sharding.Mesh:
    """The run's own mesh, where it fits the devices that are here; else each of them has the whole model, which is said."""
    try:
        mesh = mesh_lib.make_mesh(sizes)
        sharding_lib.place_state(shapes, sharding, sharding_lib.make_layout(mesh, sharding))
        return mesh
    except ConfigError as error:
        mesh = mesh_lib.make_mesh(mesh_lib.MeshSizes())
        print(f"jaxmodels: the run's mesh does not fit here ({error}) Each of the {mesh.size} devices has the whole model.", file=sys.stderr)
        return mesh


def _for_any_platform(config: dict) -> dict:
    """A run's config without its wish for an accelerator's own attention or recurrent kernel, which this machine may not have."""
    model = dict(config["model"])
    if model.get("attention") in ("cudnn", "splash"):
        model["attention"] = "auto"
    if model.get("kernel") == "cudnn":
        model["kernel"] = "xla"
    return config | {"model": model}


def _trained_info(folder: RunFolder) -> dict[str, Any]:
    """What the data said of itself when the run was trained, with the run's own tokenizer."""
    info = folder.manifest().get("info")
    if info is None:
        raise ConfigError(f"{folder.manifest_file} is missing or says nothing of the data: the run cannot be loaded.")
    if folder.tokenizer_file.is_file():
        info["tokenizer"] = tokenizers.from_json(folder.tokenizer_file.read_text(encoding="utf-8"))
    return info
