"""A pretrained model on disk: a folder with `config.json`, safetensors files and tokenizer files."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmodels.errors import ConfigError, optional_import
from jaxmodels.pretrained import gguf, safetensors
from jaxmodels.pretrained.limits import check_values
from jaxmodels.pretrained.safetensors import Tensor
from jaxmodels.storage import paths
from jaxmodels.storage.paths import BucketPath

PREFIX = "hf:"
_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
_HUB_ID = r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A pretrained model.

    Attributes:
      reference: as given, `hf:PATH_OR_ID`.
      path: the folder of the model.
      config: content of its `config.json`.
      adapters: folder of adapters to merge into the weights, if the reference names adapters; else None.
      accepted: unknown keys of its `config.json` that the reference accepts.
    """

    reference: str
    path: Path
    config: Mapping[str, Any]
    adapters: Path | None = None
    accepted: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; only headers are read.

        Raises:
          ConfigError: no safetensors files, or a file is missing, outside the folder, or damaged.
        """
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            single = self.path / "model.safetensors"
            if not single.is_file():
                raise ConfigError(_no_weights(self.path))
            return safetensors.read_header(single)
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) and "\0" not in file for file in names.values()):
            raise ConfigError(f"{index} has no weight_map from tensors to files. Copy or download it again.")
        found: dict[str, Tensor] = {}
        for file in sorted(set(names.values())):
            if file != os.path.basename(file) or file in ("", ".", ".."):
                raise ConfigError(f"{index} names the file {file!r}, which is outside the folder; only files in the folder are read.")
            if not (self.path / file).is_file():
                raise ConfigError(f"{self.path} lacks {file}, one of its {len(set(names.values()))} files of weights. Copy or download it.")
            found |= safetensors.read_header(self.path / file)
        if missing := [name for name, file in names.items() if name not in found or found[name].file.name != file]:
            raise ConfigError(f"{index} lists {missing[0]} in {names[missing[0]]}, which does not contain it. Copy or download both again.")
        return found


def is_pretrained(reference: Any) -> bool:
    """Return whether a reference names a pretrained model (`hf:PATH_OR_ID`) and not a run."""
    return isinstance(reference, str) and reference.startswith(PREFIX)


def find(reference: str, *, weights: bool = False) -> Folder:
    """Find the folder of a pretrained model; download it if the reference is an id.

    Args:
      reference: `hf:` and a folder (also one in a bucket, of which a copy is made in the cache), a GGUF file (see `pretrained.gguf`), or the id of a
        model on the Hugging Face Hub, optionally with `@REVISION`. Earlier downloads are found without a network. `?accept=KEY,KEY` at the end
        accepts unknown keys of its config.json. For a folder with LoRA adapters only, the result is the model that their config names, with
        `adapters` set.
      weights: also download the weights, not only the small files.

    Raises:
      ConfigError: no such folder or model, or it has no `config.json`.
    """
    path = place(reference, weights=weights)
    whole = any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    alone = not (path / "config.json").is_file() or (not whole and any(path.glob("adapter_model.*")))
    if (path / "adapter_config.json").is_file() and alone:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise ConfigError(f"{path / 'adapter_config.json'} lacks base_model_name_or_path, the model of its adapters. Set it there.")
        below = place(PREFIX + base, weights=weights)
        if not (below / "config.json").is_file():
            raise ConfigError(f"{reference}: its adapters are for {base}, and {below} has no config.json, so it is not a pretrained model folder.")
        return Folder(reference, below, _read_config(below / "config.json"), path, split_accepted(reference)[1])
    config = path / "config.json"
    if not config.is_file():
        raise ConfigError(f"{reference}: {path} has no config.json, so it is not a pretrained model folder.")
    return Folder(reference, path, _read_config(config), accepted=split_accepted(reference)[1])


def split_accepted(reference: str) -> tuple[str, tuple[str, ...]]:
    """Return what `hf:NAME?accept=KEY,KEY` names, and the keys of its config.json that are accepted though they are unknown."""
    found = re.fullmatch(r"(.+)\?accept=([\w.,-]+)", reference)
    return (found[1], tuple(found[2].split(","))) if found else (reference, ())


def _read_config(path: Path) -> dict[str, Any]:
    """Read a `config.json`; ConfigError also if its sizes are absurd."""
    config = read_json(path)
    check_values(config, str(path))
    return config


def place(reference: str, *, weights: bool = False) -> Path:
    """Return the folder of `hf:PATH_OR_ID`, downloaded if it is an id, whatever it contains; arguments as of `find`."""
    if not is_pretrained(reference) or reference == PREFIX:
        raise ConfigError(f"{reference!r}: a pretrained model is named hf:FOLDER, hf:FILE.gguf or hf:OWNER/NAME.")
    name = split_accepted(reference)[0].removeprefix(PREFIX)
    path = paths.parse(name, "hf").expanduser().absolute()
    if isinstance(path, BucketPath):
        if path.suffix == gguf.SUFFIX and path.is_file():
            return gguf.folder_of(paths.local_copy(path.parent, lambda file: file == path.name) / path.name)
        if not path.is_dir():
            raise ConfigError(f"{reference}: there is nothing in {path}.")
        return paths.local_copy(path, lambda file: weights or not file.endswith(".safetensors"))
    if path.suffix == gguf.SUFFIX and path.is_file():
        return gguf.folder_of(path)
    if not path.is_dir():
        if path.exists() or not re.fullmatch(_HUB_ID, name):
            raise ConfigError(f"{reference}: there is no folder {path}, and {name!r} is no id of a model on the hub (OWNER/NAME).")
        path = _download(name, weights)
    return path


@functools.lru_cache
def _download(name: str, weights: bool) -> Path:
    hub = optional_import("huggingface_hub", "huggingface")
    model, _, revision = name.partition("@")
    wanted = [*_SMALL, *(["*.safetensors"] if weights else [])]
    try:
        return Path(hub.snapshot_download(model, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # noqa: BLE001  the client raises its own exceptions, those of its HTTP library and OSError
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"hf:{name}: there is no such folder, and the download from the hub failed ({type(error).__name__}: {reason}). "
            "Without a network, name a folder: hf:/path/to/folder."
        ) from error


@contextlib.contextmanager
def whole_folder(output: str) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder, and rename it to `output` on success or delete it on an exception.

    Raises:
      ConfigError: `output` exists and is not an empty folder, or cannot be written.
    """
    path = paths.parse(output, "the output").expanduser().absolute()
    if isinstance(path, BucketPath):
        with _uploaded(path) as temporary:
            yield temporary
        return
    try:
        taken = path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))
        if taken:
            raise ConfigError(f"{path} already exists and is not an empty folder. Choose another one.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}). Choose another folder.") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _uploaded(path: BucketPath) -> Iterator[Path]:
    if path.is_dir():
        raise ConfigError(f"{path} already exists and is not an empty folder. Choose another one.")
    paths.check_writable(path, "the output")
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        try:
            paths.upload(Path(temporary), path)
        except BaseException:
            with contextlib.suppress(OSError):
                paths.delete_tree(path)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      ConfigError: the file is not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return values


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickles:
        return (
            f"{path} has its weights in {pickles[0]}, a pickle, which can execute code when loaded; only safetensors files are read. Save it "
            "again with safe_serialization=True, or use a revision of the model with model.safetensors."
        )
    return f"{path} has neither model.safetensors nor model.safetensors.index.json: it contains no weights."
