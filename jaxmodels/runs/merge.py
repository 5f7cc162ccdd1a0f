"""One run out of a run and the parent that it borrows weights from."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.models.functional import unflatten
from jaxmodels.models.lora import Lora, merge_adapters
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.runs.folder import OURS, RunFolder
from jaxmodels.step.state import TrainState


def merge(run: str, output: str) -> RunFolder:
    """Writes a run's weights as a run of their own: adapters added to their layers, frozen weights with the rest.

    What comes out is evaluated, loaded and started from like any run; it cannot be trained on in place.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`.
      output: a folder that holds no run.

    Raises:
      ConfigError: no such run, or the folder is taken.
    """
    located = weights_lib.locate(run)
    source, folder = located.folder, new_folder(output)
    config, manifest = source.config(), source.manifest()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    own = {path: stored for path, stored in located.arrays.items() if isinstance(stored, weights_lib.Stored)}
    dtypes = dict.fromkeys(located.arrays, jnp.float32) | {path: stored.dtype for path, stored in own.items()}  # published ones may be smaller
    shapes = {path: jax.ShapeDtypeStruct(stored.shape, dtypes[path], sharding=here) for path, stored in located.arrays.items()}
    arrays = weights_lib.read(located.arrays, shapes)
    stats = {path: x for path, x in arrays.items() if path in own and own[path].part == "stats"}
    params = {path: x for path, x in arrays.items() if path not in stats}
    if config["lora"] is not None:
        params = merge_adapters(params, Lora(**config["lora"]).scale)
    data = config["data"]
    if source.tokenizer_file.is_file() and "tokenizer" in data:
        data = data | {"tokenizer": str(folder.path)}  # its own, wherever its parents go
    entry = {"run": str(source.path), "id": manifest.get("id"), "step": located.step, "merged": True}
    kept = ("run", "id", "step", "weights", "model_type")
    ancestors = [{key: value for key, value in p.items() if key in kept} for p in manifest.get("parents", [])]
    training = config["training"] | {"trainable": None, "freeze": ()}
    config = config | {"lora": None, "init_from": None, "training": training, "data": data}
    tokenizer = source.tokenizer_file.read_text(encoding="utf-8") if source.tokenizer_file.is_file() else None
    write_run(folder, config, params, stats, located.step, info=manifest["info"], tokenizer=tokenizer, parents=[entry, *ancestors])
    try:
        source.add_child({"run": str(folder.path), "id": folder.identify(), "step": located.step, "needed": False})
    except OSError as error:
        folder.add_to_manifest("fallbacks", f"{source.path} could not be told that it has a child ({error.strerror})")
    return folder


def new_folder(path: str) -> RunFolder:
    """A folder for a run to be written to. Raises ConfigError if it cannot be written, or holds one."""
    folder = RunFolder(path)
    folder.check_writable()
    if taken := [name for name in OURS if (folder.path / name).exists()]:
        raise ConfigError(f"--output={folder.path} has {', '.join(taken)} in it. Choose another folder.")
    return folder


def write_run(folder: RunFolder, config: Mapping, params: dict, stats: dict, step: int, *, info: Mapping, tokenizer: str | None, parents: list[dict]) -> None:
    """Writes weights as a run that is finished: it is evaluated, loaded and started from, and not trained on.

    Args:
      folder: of `new_folder`.
      config: resolved.
      params, stats: flat, path -> array.
      step: of the checkpoint.
      info: what the data set says of itself.
      tokenizer: its JSON, or None.
      parents: for the manifest.
    """
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(jnp.int32(step), unflatten(params), {}, unflatten(stats), {}, {}, {}, zero)
    folder.path.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder.checkpoints, at_once=max(x.nbytes for x in (*params.values(), *stats.values())))
    try:
        checkpoints.save(state, Progress(evaluated_at=step, finished=True))
    finally:
        checkpoints.close()
    if tokenizer is not None:
        folder.tokenizer_file.write_text(tokenizer, encoding="utf-8")
    count = sum(x.size for x in params.values())
    folder.update_manifest(parameters=count, info={key: value for key, value in info.items() if key != "tokenizer"}, parents=parents)
    folder.identify()
    folder.write_config(config)
