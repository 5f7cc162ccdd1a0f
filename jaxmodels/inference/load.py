"""Open a run or pretrained weights, and load the model."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_model
from jaxmodels.inference.pretrained import pretrained_config
from jaxmodels.inference.run import Run
from jaxmodels.models import functional
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.pretrained.folder import is_pretrained
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.checkpoint import parse_run
from jaxmodels.runs.folder import RunFolder
from jaxmodels.step import state
from jaxmodels.tokenizers import factory as tokenizers


def load(run: str, *, spread: bool = False, mesh: Mapping[str, int] | None = None) -> Run:
    """Load a run or a pretrained model for prediction and generation. No data set is needed.

    Args:
      run: as in `evaluate`; or `hf:FOLDER` or `hf:OWNER/NAME`, with the published head.
      spread: shard the weights over all devices by the run's own mesh; otherwise place them on the first device.
      mesh: sizes of the mesh that are others than the run's, such as `{"tensor": 4}`; with them the weights are spread, and the mesh must fit the devices.

    Raises:
      ConfigError: the run cannot be loaded, or the mesh does not fit.
    """
    opened = open_run(run)
    graph, params, stats = functional.split(opened.model)
    if spread or mesh:
        shapes, sharding = state.weights_alone(params, stats), sharding_lib.Sharding(**opened.config["sharding"])
        if mesh:
            devices = mesh_lib.make_mesh(mesh_lib.MeshSizes(**opened.config["mesh"] | dict(mesh)))
        else:
            devices = fitting_mesh(mesh_lib.MeshSizes(**opened.config["mesh"]), sharding, shapes)
        layout = sharding_lib.make_layout(devices, sharding)
        shapes = sharding_lib.place_state(shapes, sharding, layout)
        params, stats = shapes.params, shapes.stats
    else:
        layout, here = None, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params, stats = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree) for tree in (params, stats))
    params, stats = weights_lib.read_model(opened.located, params, stats)
    model = functional.evaluation_model(graph, params, stats)
    return Run(model, opened.task, opened.config, opened.located.step, opened.info.get("tokenizer"), layout, opened.located, opened.info)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run or a pretrained model whose weights are not read yet.

    Attributes:
      config: the resolved config, with accelerator-specific kernels replaced by portable ones.
      info: description of the data set.
      task: the task object.
      model: the module, with shapes instead of arrays.
      located: location of the weights.
    """

    config: dict[str, Any]
    info: Mapping[str, Any]
    task: Any
    model: nnx.Module
    located: weights_lib.Located


def open_run(run: str) -> Opened:
    """Open a run without reading its weights, for callers that read them in another way; arguments and errors as in `load`."""
    if is_pretrained(run):
        config, info = pretrained_config(run)
    else:
        folder = RunFolder(parse_run(run)[0])
        config, info = portable_config(folder.config()), trained_info_of(folder)
    task, build = build_model(config, info)
    model = nnx.eval_shape(lambda: build(functional.new_rngs(params=0)))
    _, params, stats = functional.split(model)
    if is_pretrained(run):
        located = weights_lib.locate_whole(run, config["model"], functional.flatten(params) | functional.flatten(stats))
    else:
        located = weights_lib.locate(run)
    return Opened(config, info, task, model, located)


def fitting_mesh(sizes: mesh_lib.MeshSizes, sharding: sharding_lib.Sharding, shapes: state.TrainState) -> jax.sharding.Mesh:
    """Return the run's own mesh if it fits the devices of this machine; else print a warning and return a mesh that replicates the model."""
    try:
        mesh = mesh_lib.make_mesh(sizes)
        sharding_lib.place_state(shapes, sharding, sharding_lib.make_layout(mesh, sharding))
        return mesh
    except ConfigError as error:
        mesh = mesh_lib.make_mesh(mesh_lib.MeshSizes())
        print(f"jaxmodels: the run's mesh does not fit these devices ({error}) The model is replicated on each of the {mesh.size} devices.", file=sys.stderr)
        return mesh


def portable_config(config: dict) -> dict:
    """Return the config with accelerator-specific attention and recurrent kernels replaced by portable ones."""
    model = dict(config["model"])
    if model.get("attention") in ("cudnn", "splash"):
        model["attention"] = "auto"
    if model.get("kernel") == "cudnn":
        model["kernel"] = "xla"
    return config | {"model": model}


def trained_info_of(folder: RunFolder) -> dict[str, Any]:
    """Return the description of the data set that the run was trained on, with the run's own tokenizer."""
    info = folder.manifest().get("info")
    if info is None:
        damaged = folder.damaged_manifest()
        state = f"is damaged ({damaged})" if damaged else "is missing or has no `info` of the data set"
        raise ConfigError(f"{folder.manifest_file} {state}: the run cannot be loaded. Restore the file, or resume the run, which writes it anew.")
    if folder.tokenizer_file.is_file():
        info["tokenizer"] = tokenizers.from_json(folder.tokenizer_file.read_text(encoding="utf-8"))
    return info
