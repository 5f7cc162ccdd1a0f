"""A model's forward pass as StableHLO, by `jax.export`: a program that runs without the code that made it.

    forward.stablehlo        the program, serialised: `jax.export.deserialize` reads it
    parameters.safetensors   what it computes with, under the paths of the run's parameters and statistics
    forward.json             how it is called

The program is a function of two dictionaries, the parameters by path and the inputs by name, and gives what the model gives: logits,
not probabilities. Any batch size will do, and any length up to the model's context where it reads a sequence. It was lowered for each
of `PLATFORMS`, and is in the parameters' own precision, with the attention that every platform has.

Only what writes it needs the rest of this package, which is why that is imported there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jaxmodels.errors import ConfigError, optional_import
from jaxmodels.pretrained import safetensors
from jaxmodels.pretrained.folder import read_json, whole_folder

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, PARAMETERS, DESCRIPTION = "forward.stablehlo", "parameters.safetensors", "forward.json"
_WHOLE_NUMBERS = ("tokens", "types", "source", "target")
_MEANINGS = {
    "tokens": "token numbers; -1 is padding",
    "types": "kinds of tokens: 0 of a first text, 1 of a second",
    "source": "token numbers; -1 is padding",
    "target": "token numbers from the start token on; -1 is padding, after the tokens",
    "image": "values from 0 to 1",
    "frames": "vectors, padding after them",
    "valid": "false at padding",
    "past": "what is known",
}


class Forward:
    """An exported forward pass with its parameters.

    Attributes:
      description: what `forward.json` says.
    """

    def __init__(self, exported: jax_export.Exported, parameters: Mapping[str, jax.Array], description: Mapping[str, Any]):
        self.description, self._parameters = description, dict(parameters)
        self._call = jax.jit(exported.call)

    def __call__(self, **inputs: Any) -> jax.Array:
        """What the model gives.

        Args:
          inputs: arrays by name, as `description["inputs"]` lists them.

        Raises:
          ValueError: one is missing, unknown, of another type or shape, or too long.
        """
        wanted = self.description["inputs"]
        if set(inputs) != set(wanted):
            raise ValueError(f"the inputs are {', '.join(wanted)}, not {', '.join(inputs) or 'none'}")
        arrays = {name: jnp.asarray(inputs[name]) for name in wanted}
        sizes: dict[str, int] = {}
        for name, x in arrays.items():
            shape, dtype = wanted[name]["shape"], wanted[name]["dtype"]
            if dtype == "int32" and jnp.issubdtype(x.dtype, jnp.integer):
                arrays[name] = x = x.astype(dtype)
            if x.dtype.name != dtype or not _fits(x.shape, shape, sizes):
                raise ValueError(f"{name} is {x.dtype.name} {list(x.shape)}, not {dtype} [{', '.join(map(str, shape))}]")
        for name, limit in self.description["limits"].items():
            if sizes[name] > limit:
                raise ValueError(f"{name} is {sizes[name]}, more than the model's context of {limit}")
        return self._call(self._parameters, arrays)


def _fits(shape: tuple[int, ...], wanted: list[int | str], sizes: dict[str, int]) -> bool:
    """Whether a shape is that of an input; names of sizes get their values in `sizes`."""
    if len(shape) != len(wanted):
        return False
    return all(sizes.setdefault(size, n) == n if isinstance(size, str) else size == n for size, n in zip(wanted, shape, strict=True))


def _parameters(exported: jax_export.Exported) -> dict[str, Any]:
    """Shapes of the parameters that a program is called with, by path."""
    arguments, _ = exported.in_tree.unflatten(exported.in_avals)
    return arguments[0]


def load_stablehlo(folder: str) -> Forward:
    """An exported forward pass, ready to call: `forward(tokens=…)`. Needs jax, and no model's code.

    Raises:
      ConfigError: the folder holds none, or one that is damaged or not whole.
    """
    path = Path(folder).expanduser().absolute()
    if missing := [name for name in (PROGRAM, PARAMETERS, DESCRIPTION) if not (path / name).is_file()]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: it is not what jaxmodels export --format=stablehlo writes.")
    optional_import("flatbuffers", "export")
    description = read_json(path / DESCRIPTION)
    try:
        exported = jax_export.deserialize(bytearray((path / PROGRAM).read_bytes()))
    except Exception as error:  # noqa: BLE001  flatbuffers and jaxlib raise their own
        raise ConfigError(f"{path / PROGRAM} cannot be read by this version of jax ({jax.__version__}): {_line(error)}. Export it anew.") from error
    tensors = safetensors.read_header(path / PARAMETERS)
    given, wanted = ({name: tuple(x.shape) for name, x in arrays.items()} for arrays in (tensors, _parameters(exported)))
    if given != wanted:
        differs = sorted(name for name in {*given, *wanted} if given.get(name) != wanted.get(name))
        raise ConfigError(f"{path}: {PARAMETERS} does not belong to {PROGRAM}: they differ in {differs[0]}. Export it anew.")
    return Forward(exported, {name: jnp.asarray(tensor.view()) for name, tensor in tensors.items()}, description)


def export_stablehlo(run: str, output: str) -> Path:
    """Writes the forward pass of a run, or of a pretrained model, to a folder, which appears when it is whole.

    Parameters are read from disk and written one at a time: a model need not fit into memory.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest`, `RUN@STEP`, or `hf:PATH_OR_ID`.
      output: a folder that does not exist, or is empty.

    Returns:
      The folder.

    Raises:
      ConfigError: no such run, the folder is taken, or the model cannot be exported.
    """
    from jaxmodels.inference import load
    from jaxmodels.runs import weights as weights_lib

    optional_import("flatbuffers", "export")
    with whole_folder(output) as folder:
        opened = load.open_run(run)
        graph, shapes = _settled(opened)
        exported, inputs, notes = _export(opened, graph, shapes)
        (folder / PROGRAM).write_bytes(exported.serialize())
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def read(path: str) -> np.ndarray:
            placed = jax.ShapeDtypeStruct(shapes[path].shape, shapes[path].dtype, sharding=here)
            return np.asarray(weights_lib.read(opened.located.arrays, {path: placed})[path])

        tensors = {path: safetensors.ToWrite(x.shape, np.dtype(x.dtype), lambda path=path: read(path)) for path, x in shapes.items()}
        safetensors.write(folder / PARAMETERS, tensors, {"format": "jaxmodels"})
        description = _describe(opened, exported, inputs, notes)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return Path(output).expanduser().absolute()


def _settled(opened: Any) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """The graph of a run's model as every platform can compute it, and the shapes of its parameters and statistics by path."""
    from jaxmodels.models import attention, functional, rnn

    attention.resolve_implementation(opened.model, "cpu")
    rnn.resolve_implementation(opened.model, "cpu")
    graph, params, stats = functional.split(opened.model)
    return graph, {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in (functional.flatten(params) | functional.flatten(stats)).items()}


def _export(opened: Any, graph: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax_export.Exported, dict, list[str]]:
    """The program, its inputs' shapes, and what of them had to be fixed."""

    from jaxmodels.models import functional

    statistics = functional.flatten(functional.split(opened.model)[2])

    def forward(parameters: Mapping[str, jax.Array], inputs: Mapping[str, jax.Array]) -> jax.Array:
        params = {path: x for path, x in parameters.items() if path not in statistics}
        stats = {path: x for path, x in parameters.items() if path in statistics}
        return functional.evaluation_model(graph, functional.unflatten(params), functional.unflatten(stats))(**inputs)

    notes: list[str] = []
    for symbolic in (True, False):
        inputs = _inputs(opened, symbolic)
        try:
            return jax_export.export(jax.jit(forward), platforms=PLATFORMS)(dict(shapes), inputs), inputs, notes
        except Exception as error:  # noqa: BLE001  what a model of any make raises when traced with lengths that are not known
            if not symbolic or not any("length" in str(x.shape) for x in inputs.values()):
                raise ConfigError(f"{opened.config['model']['name']!r} cannot be exported with a batch of any size: {_line(error)}.") from error
            notes.append(f"the length is fixed, since the model cannot be traced without knowing it: {_line(error)}")
    raise AssertionError("one of the two returned or raised")


def _inputs(opened: Any, symbolic: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the model is called with: any batch size, and any length where `symbolic`, else the context."""
    names = _input_names(opened)
    context = opened.config["model"].get("context")
    lengths = {name: f"{name}_length" if name in ("source", "target") else "length" for name in names}
    if not symbolic and context is None:
        raise ConfigError(f"{opened.config['model']['name']!r} has no context, so there is no length to export it for.")
    limits = [f"{length} <= {context}" for length in dict.fromkeys(lengths.values())] if context is not None and symbolic else []
    scope = jax_export.SymbolicScope(limits)
    inputs = {}
    for name in names:
        like = {"types": "tokens", "valid": "frames"}.get(name, name)
        shape = opened.task.batch[like][:1] if name == "valid" else opened.task.batch[like]
        text = ", ".join(["batch", *(str(size or (lengths[name] if symbolic else context)) for size in shape)])
        dtype = jnp.int32 if name in _WHOLE_NUMBERS else jnp.bool_ if name == "valid" else jnp.float32
        inputs[name] = jax.ShapeDtypeStruct(jax_export.symbolic_shape(text, scope=scope), dtype)
    return inputs


def _input_names(opened: Any) -> list[str]:
    """What the model is called with: its positional arguments, and those others that its result depends on."""
    from jaxmodels import config as config_lib

    names = config_lib.positional(type(opened.model).__call__)[1:]
    if unknown := [name for name in names if name not in opened.task.batch]:
        raise ConfigError(
            f"{opened.config['model']['name']!r} is called with {', '.join(names)}, but the data of {opened.config['task']['name']!r} has no "
            f"{unknown[0]}: its shape is not known, so it cannot be exported."
        )
    if getattr(opened.model, "types", None) is not None:
        names.append("types")
    return [*names, "valid"] if names == ["frames"] else names


def _describe(opened: Any, exported: jax_export.Exported, inputs: Mapping, notes: list[str]) -> dict[str, Any]:
    """What `forward.json` says."""
    arguments = [*({"parameter": path} for path in sorted(_parameters(exported))), *({"input": name} for name in sorted(inputs))]
    config, context = opened.config, opened.config["model"].get("context")
    meanings = {name: _MEANINGS.get(name) for name in inputs}
    if "image" in inputs and (config["task"].get("mean") or config["task"].get("std")):
        meanings["image"] += f", minus {config['task']['mean']}, divided by {config['task']['std']}"
    return {
        "format": "jax.export, called with (parameters by path, inputs by name)",
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "parameters": PARAMETERS,
        "inputs": {name: {"shape": _shape(x), "dtype": x.dtype.name, "means": meanings[name]} for name, x in inputs.items()},
        "output": {"shape": _shape(exported.out_avals[0]), "dtype": exported.out_avals[0].dtype.name},
        "limits": {str(size): context for x in inputs.values() for size in x.shape[1:] if jax_export.is_symbolic_dim(size) and context is not None},
        "arguments": [arguments[i] for i in exported.module_kept_var_idx],
        "notes": notes,
        "run": str(opened.located.name),
        "step": opened.located.step,
        "model": dict(config["model"]),
        "task": config["task"]["name"],
    }


def _shape(x: Any) -> list[int | str]:
    return [str(size) if jax_export.is_symbolic_dim(size) else size for size in x.shape]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(".: ")
