"""Runs that trained adapters (`lora`) of one parent, on one copy of the parent's weights."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.inference.load import open_run
from jaxmodels.inference.run import Run
from jaxmodels.models import functional, lora_rows
from jaxmodels.models.encoder_decoder import EncoderDecoder
from jaxmodels.models.lora import ADAPTERS, Lora
from jaxmodels.models.transformer import Decoder
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.runs import weights as weights_lib


def with_adapters(run: Run, adapters: Mapping[str, str]) -> nnx.Module:
    """Return the model of a run with the adapters of its children, for `lora_rows.use`: those named first are 1, 2, ….

    Args:
      run: of `load`; unchanged.
      adapters: name -> `RUN`, `RUN@best`, ….

    Raises:
      ConfigError: a run has no adapters, trained more than these, or is not a child of this run.
    """
    model = functional.merge(*functional.split(run.model))
    model.eval()
    if not isinstance(model, Decoder | EncoderDecoder):
        raise ConfigError(f"adapters are served by row on Transformers only, not on {type(model).__name__}: serve each run as a model of its own.")
    found = [_read(run, name, reference) for name, reference in adapters.items()]
    try:
        lora_rows.add(model, found)
    except ValueError as error:
        raise ConfigError(f"{error}: serve that run as a model of its own.") from error
    return model


def _read(run: Run, name: str, reference: str) -> tuple[dict[str, jax.Array], float]:
    """Return the parameters of a run's adapters, and the factor on their products."""
    opened, own_way = open_run(reference), "Serve it as a model of its own."
    if opened.config["lora"] is None:
        raise ConfigError(f"adapter {name}: {reference} has trained no adapters (config.lora). {own_way}")
    graph, params, stats = functional.split(opened.model)
    shapes, located = functional.flatten(params), opened.located
    if any(path.endswith(ADAPTERS) for path in run.located.arrays):
        raise ConfigError(f"adapter {name}: {run.located.name}, on which it is to be served, has adapters itself. jaxmodels merge makes them weights.")
    for path in {**shapes, **functional.flatten(stats)}:
        if not path.endswith(ADAPTERS) and not _same(located, run.located, path):
            raise ConfigError(
                f"adapter {name}: {path} of {reference} is not that of {run.located.name} at step {run.located.step}: it was trained too, or comes from "
                f"another run. {own_way}"
            )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if run.layout is None else mesh_lib.replicated(run.layout.mesh)
    wanted = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for path, x in shapes.items() if path.endswith(ADAPTERS)}
    return weights_lib.read(located.arrays, wanted), Lora(**opened.config["lora"]).scale


def _same(one: weights_lib.Located, other: weights_lib.Located, path: str) -> bool:
    """Return whether two runs read the same array."""
    x, y = one.arrays.get(path), other.arrays.get(path)
    if isinstance(x, weights_lib.Stored) or isinstance(y, weights_lib.Stored):
        return type(x) is type(y) and _place(x) == _place(y)
    parents = [] if one.folder is None else one.folder.manifest().get("parents", [])
    known: Any = other.pretrained.fingerprint if other.pretrained is not None else None
    return type(x) is type(y) and known is not None and bool(parents) and parents[0].get("id") == known


def _place(stored):
    folder = stored.checkpoints
    return folder.resolve() if hasattr(folder, "resolve") else folder, stored.step, stored.part, stored.path
