"""A train step compiled elsewhere, as a folder: the executable, and a page that describes it.

    executable.json    versions, devices, mesh, config, arguments and results; the plan's figures
    executable.bin     the compiled step, by jax.experimental.serialize_executable

A run loads it instead of compiling if versions and devices are those of the page, and the step, traced anew, is the program that was compiled: changes of
config or code are noticed. Loading runs what is in the file: load only what you trust.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxmodels import config as config_lib
from jaxmodels.distributed import session
from jaxmodels.errors import ConfigError, RunError
from jaxmodels.hardware.chips import chip_of
from jaxmodels.runs.folder import now
from jaxmodels.runs.json_files import write_json

PAGE, PROGRAM = "executable.json", "executable.bin"

# Packages that make an executable, and that read it; of a platform's compilers some may be missing.
_PACKAGES = ("jaxmodels", "jax", "jaxlib")
_COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda12-pjrt", "jax-cuda13-pjrt")}

# Parts of a config that do not change the step's program.
_ELSEWHERE = (
    "seed",
    "evaluation",
    "checkpoint",
    "init_from",
    "log.tensorboard",
    "data.threads",
    "data.workers",
    "data.buffer",
    "data.memory_gb",
    "data.shuffle",
)


def save(step: Any, folder: str | os.PathLike, figures: Mapping[str, Any]) -> dict:
    """Write a compiled train step to a folder, in place of one that is there. Returns the page.

    Args:
      step: a `plan.compiler.CompiledStep`.
      folder: created if needed.
      figures: of its plan, which a run that loads it is compared with.

    Raises:
      ConfigError: the folder cannot be written.
      RunError: this kind of executable cannot be saved.
    """
    folder = Path(folder)
    try:
        content, _, _ = serialize_executable.serialize(step.compiled)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        raise RunError(f"the executable cannot be saved: {str(error).splitlines()[0]}. Plan without --save; train compiles it then.") from error
    page = {
        "time": now(),
        "versions": versions(step.mesh),
        "devices": devices(step.mesh),
        "mesh": dict(step.mesh.shape),
        "config": step.experiment.config,
        "compiler_options": step.record.options,
        "program": step.record.program,
        "arguments": _described(step.compiled.args_info[0], step.compiled.input_shardings[0]),
        "results": _described(step.compiled.out_info, step.compiled.output_shardings),
        "executable": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "plan": dict(figures),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).unlink(missing_ok=True)  # a page is there only with what it describes
        (folder / PROGRAM).write_bytes(content)
        write_json(folder / PAGE, page)
    except OSError as error:
        raise ConfigError(f"--save={folder} cannot be written ({error.strerror}). Choose another folder.") from error
    return page


def versions(mesh: jax.sharding.Mesh) -> dict[str, str]:
    """Return the versions of the packages that make an executable for the devices of a mesh."""
    return installed((*_PACKAGES, *_COMPILERS.get(mesh.devices.flat[0].platform, ())))


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def devices(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What an executable depends on in a mesh's devices: platform, chip, number, and their order in the mesh."""
    flat = list(mesh.devices.flat)
    places = [[device.id, *getattr(device, "coords", ()), getattr(device, "core_on_chip", 0)] for device in flat]
    chip = chip_of(flat[0].device_kind)
    return {"platform": flat[0].platform, "kind": chip.name if chip else flat[0].device_kind, "count": len(flat), "places": places}


def _described(tree: Any, shardings: Any) -> dict[str, str]:
    """Path -> type, shape and sharding: `float32[256,64] ('fsdp', None)`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}[{','.join(map(str, x.shape))}] {tuple(sharding.spec)}"
        for (path, x), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings), strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Saved:
    """A folder that `save` wrote, and its page."""

    folder: Path
    page: dict

    def load(self, lowered: jax.stages.Lowered, program: str, options: Mapping, config: Mapping, mesh: jax.sharding.Mesh) -> tuple[Any, str | None]:
        """Load the executable on the devices of a mesh; of several processes, all load it or none.

        Args:
          lowered: the step, as it would be compiled here.
          program: its SHA-256, as `CompileRecord.program`.
          options: that the compiler would be given here.
          config: resolved.
          mesh: of all processes' devices.

        Returns:
          The compiled step, and None; or None, and in one line why not.
        """
        compiled, reason = None, "; ".join(self._differences(program, options, config, mesh)) or None
        if reason is None:
            try:
                compiled = self._read(lowered, mesh)
            except Exception as error:  # reported: what unpickles a file can raise anything
                reason = f"it cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        reasons = session.gather("executable", reason)
        other = next((i for i, each in enumerate(reasons) if each), None)
        if other is None:
            return compiled, None
        return None, reasons[other] if len(reasons) == 1 else f"process {other}: {reasons[other]}"

    def _read(self, lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> Any:
        content = (self.folder / PROGRAM).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.page["executable"]["sha256"]:
            raise RunError(f"{PROGRAM} is not the file that {PAGE} describes")
        used = list(mesh.devices.flat)
        return serialize_executable.deserialize_and_load(content, lowered.in_tree, lowered.out_tree, backend=used[0].client, execution_devices=used)

    def _differences(self, program: str, options: Mapping, config: Mapping, mesh: jax.sharding.Mesh) -> list[str]:
        """Return the reasons not to load it: only the first kind of difference, because the others may follow from it."""
        page, here = self.page, devices(mesh)
        kinds = (
            ("the devices' ", page["devices"] | {"places": None}, here | {"places": None}),
            ("mesh.", page["mesh"], dict(mesh.shape)),
            ("", page["versions"], versions(mesh)),
        )
        for prefix, there, now_ in kinds:
            if changed := config_lib.differences(there, now_):
                return [f"{prefix}{key} is {a} in the saved step, {b} here" for key, (a, b) in changed.items()]
        if page["devices"]["places"] != here["places"]:
            return ["the mesh has the devices in another order, or with other ids"]
        if changed := config_lib.differences(page["compiler_options"], options):
            return [f"compiler option {key} is {a} in the saved step, {b} here" for key, (a, b) in changed.items()]
        if page["program"] == program:
            return []
        changed = config_lib.differences(page["config"], _as_json(config))
        named = {key: pair for key, pair in changed.items() if not any(key == part or key.startswith(part + ".") for part in _ELSEWHERE)}
        return [f"config.{key} is {a!r} in the saved step, {b!r} here" for key, (a, b) in named.items()] or [
            "the config is the same, but the program of the step differs: code or shapes of the data have changed"
        ]


def _as_json(value: Any) -> Any:
    """Return the value as JSON reads it back: tuples as lists."""
    return json.loads(json.dumps(value))


def open_saved(folder: str | os.PathLike) -> Saved:
    """Open a folder that `jaxmodels plan --save` wrote.

    Raises:
      ConfigError: it is not such a folder, or is incomplete.
    """
    folder = Path(folder).absolute()
    if not (folder / PAGE).is_file() or not (folder / PROGRAM).is_file():
        what = "there is no such folder" if not folder.is_dir() else f"it has no {PAGE if not (folder / PAGE).is_file() else PROGRAM}"
        raise ConfigError(f"--plan={folder} is not a saved step ({what}): write one with jaxmodels plan --config=… --topology=… --save={folder}.")
    try:
        page = json.loads((folder / PAGE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--plan={folder}: {PAGE} is not valid JSON ({error}): save it again with jaxmodels plan --save.") from error
    missing = {"versions", "devices", "mesh", "config", "compiler_options", "program", "executable", "plan"} - page.keys()
    if missing:
        raise ConfigError(f"--plan={folder}: {PAGE} lacks {', '.join(sorted(missing))}: save it again with jaxmodels plan --save.")
    return Saved(folder, page)
