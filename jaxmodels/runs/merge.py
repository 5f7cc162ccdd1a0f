"""Merge a run with the weights of its parent into a new run."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.models import vocabulary
from jaxmodels.models.functional import unflatten
from jaxmodels.models.lora import Lora, merge_adapters
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.runs.folder import OURS, RunFolder
from jaxmodels.runs.lock import held
from jaxmodels.step.state import TrainState


def merge(run: str, output: str) -> RunFolder:
    """Write a new run with all weights of a run: adapters merged into their layers, frozen parameters copied from the parent.

    The new run can be evaluated, loaded, exported and used as a parent, but not resumed.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`.
      output: a folder without a run.

    Raises:
      ConfigError: no such run, or `output` contains a run or is not writable.
    """
    located = weights_lib.locate(run)
    source, folder = located.folder, new_folder(output)
    config, manifest = source.config(), source.manifest()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    own = {path: stored for path, stored in located.arrays.items() if isinstance(stored, weights_lib.Stored)}
    dtypes = dict.fromkeys(located.arrays, jnp.float32) | {path: stored.dtype for path, stored in own.items()}  # pretrained weights may have a smaller type
    shapes = {path: jax.ShapeDtypeStruct(stored.shape, dtypes[path], sharding=here) for path, stored in located.arrays.items()}
    arrays = weights_lib.read(located.arrays, shapes)
    stats = {path: x for path, x in arrays.items() if path in own and own[path].part == "stats"}
    params = {path: x for path, x in arrays.items() if path not in stats}
    if config["lora"] is not None:
        params = merge_adapters(params, Lora(**config["lora"]).scale)
    data = config["data"]
    if source.tokenizer_file.is_file() and "tokenizer" in data:
        data = data | {"tokenizer": str(folder.path)}  # a copy in the new run, which does not depend on the parents
    entry = {"run": str(source.path), "id": manifest.get("id"), "step": located.step, "merged": True}
    copied = ("run", "id", "step", "weights", "model_type")
    ancestors = [{key: value for key, value in p.items() if key in copied} for p in manifest.get("parents", [])]
    training = config["training"] | {"trainable": None, "freeze": ()}
    config = config | {"lora": None, "init_from": None, "training": training, "data": data}
    tokenizer = source.tokenizer_file.read_text(encoding="utf-8") if source.tokenizer_file.is_file() else None
    write_run(folder, config, params, stats, located.step, info=manifest["info"], tokenizer=tokenizer, parents=[entry, *ancestors])
    try:
        source.add_child({"run": str(folder.path), "id": folder.identify(), "step": located.step, "needed": False})
    except OSError as error:
        folder.add_to_manifest("fallbacks", f"the child was not recorded in {source.path} ({error.strerror})")
    return folder


def new_folder(path: str) -> RunFolder:
    """Return the folder for a new run; ConfigError if it is not writable or contains a run."""
    folder = RunFolder(path)
    folder.check_writable()
    if taken := [name for name in OURS if (folder.path / name).exists()]:
        raise ConfigError(f"--output={folder.path} already contains {', '.join(taken)}. Choose another folder.")
    return folder


def write_run(folder: RunFolder, config: Mapping, params: dict, stats: dict, step: int, *, info: Mapping, tokenizer: str | None, parents: list[dict]) -> None:
    """Write weights as a finished run.

    Args:
      folder: of `new_folder`.
      config: resolved.
      params, stats: flat, path -> array.
      step: of the checkpoint.
      info: properties of the data set, `Dataset.info`.
      tokenizer: JSON of the tokenizer, or None.
      parents: entry `parents` of the manifest.
    """
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(jnp.int32(step), unflatten(params), {}, unflatten(stats), {}, {}, {}, zero)
    with held(folder) as lock:
        new_folder(str(folder.path))  # again: another process may have written a run since
        checkpoints = Checkpoints(folder.checkpoints, at_once=max(x.nbytes for x in (*params.values(), *stats.values())), may_write=lock.check)
        try:
            checkpoints.save(state, Progress(evaluated_at=step, finished=True))
        finally:
            checkpoints.close()
        if tokenizer is not None:
            folder.tokenizer_file.write_text(tokenizer, encoding="utf-8")
        count = sum(x.size for x in params.values()) - vocabulary.padding(params, config["model"], info.get("vocab_size"))
        folder.update_manifest(parameters=count, info={key: value for key, value in info.items() if key != "tokenizer"}, parents=parents)
        folder.identify()
        folder.write_config(config)
