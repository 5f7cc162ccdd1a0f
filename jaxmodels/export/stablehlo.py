"""Export a model's forward pass as StableHLO by `jax.export`: a program that runs without the model's code.

    forward.stablehlo        the serialised program, for `jax.export.deserialize`
    parameters.safetensors   its parameters and statistics, by their paths in the run
    forward.json             how to call it

The program is a function of two dictionaries, the parameters by path and the inputs by name. It returns the model's output: logits, not
probabilities. It accepts any batch size, and any sequence length up to the model's context. It is lowered for each of `PLATFORMS`, in the
parameters' own precision, with the portable attention implementation.

Loading an export does not need the rest of the package, so the writing functions import it themselves.
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
from jaxmodels.storage import paths as storage

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, PARAMETERS, DESCRIPTION = "forward.stablehlo", "parameters.safetensors", "forward.json"
_WHOLE_NUMBERS = ("tokens", "types", "source", "target")
_MEANINGS = {
    "tokens": "token ids; -1 is padding",
    "types": "token types: 0 for the first text, 1 for the second",
    "source": "token ids; -1 is padding",
    "target": "token ids from the start token on; -1 is padding, after the tokens",
    "image": "values from 0 to 1",
    "frames": "feature vectors, followed by padding",
    "valid": "false at padding",
    "past": "past values",
}


class Forward:
    """An exported forward pass with its parameters.

    Attributes:
      description: content of `forward.json`.
    """

    def __init__(self, exported: jax_export.Exported, parameters: Mapping[str, jax.Array], description: Mapping[str, Any]):
        self.description, self._parameters = description, dict(parameters)
        self._call = jax.jit(exported.call)

    def __call__(self, **inputs: Any) -> jax.Array:
        """Return the model's output.

        Args:
          inputs: arrays by name, as listed in `description["inputs"]`.

        Raises:
          ValueError: an input is missing, unknown, too long, or has another dtype or shape.
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
    """Return whether a shape matches that of an input; bind the symbolic sizes in `sizes`."""
    if len(shape) != len(wanted):
        return False
    return all(sizes.setdefault(size, n) == n if isinstance(size, str) else size == n for size, n in zip(wanted, shape, strict=True))


def _parameters(exported: jax_export.Exported) -> dict[str, Any]:
    """Return the shapes of a program's parameters by path."""
    arguments, _ = exported.in_tree.unflatten(exported.in_avals)
    return arguments[0]


def load_stablehlo(folder: str) -> Forward:
    """Load an exported forward pass, called as `forward(tokens=…)`. Needs only jax, not the model's code.

    Raises:
      ConfigError: the folder holds no export, or a damaged or incomplete one.
    """
    path = storage.parse(folder).expanduser().absolute()
    if missing := [name for name in (PROGRAM, PARAMETERS, DESCRIPTION) if not (path / name).is_file()]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; expected a folder written by jaxmodels export --format=stablehlo.")
    optional_import("flatbuffers", "export")
    description = read_json(path / DESCRIPTION)
    try:
        exported = jax_export.deserialize(bytearray((path / PROGRAM).read_bytes()))
    except Exception as error:  # flatbuffers and jaxlib raise their own types
        raise ConfigError(f"{path / PROGRAM} cannot be read by jax {jax.__version__}: {_line(error)}. Export the model again.") from error
    tensors = safetensors.read_header(path / PARAMETERS)
    given, wanted = ({name: tuple(x.shape) for name, x in arrays.items()} for arrays in (tensors, _parameters(exported)))
    if given != wanted:
        differs = sorted(name for name in {*given, *wanted} if given.get(name) != wanted.get(name))
        raise ConfigError(f"{path}: {PARAMETERS} does not match {PROGRAM}: they differ in {differs[0]}. Export the model again.")
    return Forward(exported, {name: jnp.asarray(tensor.view()) for name, tensor in tensors.items()}, description)


def export_stablehlo(run: str, output: str) -> Path:
    """Write the forward pass of a run or a pretrained model to a folder, which appears under its name once it is complete.

    Parameters are copied one at a time, so the model need not fit into memory.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest`, `RUN@STEP`, or `hf:PATH_OR_ID`.
      output: a folder that does not exist or is empty.

    Returns:
      The folder.

    Raises:
      ConfigError: the run does not exist, the folder is not empty, or the model cannot be exported.
    """
    from jaxmodels.inference import load
    from jaxmodels.runs import weights as weights_lib

    optional_import("flatbuffers", "export")
    with whole_folder(output) as folder:
        opened = load.open_run(run)
        graph, shapes = _portable_graph(opened)
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
    return storage.parse(output).expanduser().absolute()


def _portable_graph(opened: Any) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """Return the model's graph with portable implementations, and the shapes of its parameters and statistics by path."""
    from jaxmodels.models import attention, functional, rnn

    attention.resolve_implementation(opened.model, "cpu")
    rnn.resolve_implementation(opened.model, "cpu")
    graph, params, stats = functional.split(opened.model)
    return graph, {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in (functional.flatten(params) | functional.flatten(stats)).items()}


def _export(opened: Any, graph: Any, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax_export.Exported, dict, list[str]]:
    """Return the exported program, the shapes of its inputs, and notes on sizes that had to be fixed."""
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
        except Exception as error:  # a user's model may raise anything when traced with symbolic lengths
            if not symbolic or not any("length" in str(x.shape) for x in inputs.values()):
                raise ConfigError(f"{opened.config['model']['name']!r} cannot be exported with a symbolic batch size: {_line(error)}.") from error
            notes.append(f"the sequence length is fixed, since tracing with a symbolic length failed: {_line(error)}")
    raise AssertionError("one of the two returned or raised")


def _inputs(opened: Any, symbolic: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the model's inputs, with a symbolic batch size; lengths are symbolic, or the context if not `symbolic`."""
    names = _input_names(opened)
    context = opened.config["model"].get("context")
    lengths = {name: f"{name}_length" if name in ("source", "target") else "length" for name in names}
    if not symbolic and context is None:
        raise ConfigError(f"{opened.config['model']['name']!r} has no `context`, so no fixed sequence length to export with.")
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
    """Return the names of the model's inputs: its positional arguments, and the optional ones that affect its output."""
    from jaxmodels import config as config_lib

    names = config_lib.positional(type(opened.model).__call__)[1:]
    if unknown := [name for name in names if name not in opened.task.batch]:
        raise ConfigError(
            f"{opened.config['model']['name']!r} takes {', '.join(names)}, but batches of {opened.config['task']['name']!r} have no "
            f"{unknown[0]}: its shape is unknown, so the model cannot be exported."
        )
    if getattr(opened.model, "types", None) is not None:
        names.append("types")
    return [*names, "valid"] if names == ["frames"] else names


def _describe(opened: Any, exported: jax_export.Exported, inputs: Mapping, notes: list[str]) -> dict[str, Any]:
    """Return the content of `forward.json`."""
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
