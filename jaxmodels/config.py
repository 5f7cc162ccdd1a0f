"""Load, override, check and compare configs.

A config is a nested dictionary. Each section holds keyword-only arguments of one constructor (see `jaxmodels.experiment.sections`), so the
allowed keys, their types and defaults are read from its signature.
"""

import ast
import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import json
import os
import re
import runpy
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxmodels.errors import ConfigError
from jaxmodels.storage import paths as storage

REQUIRED = inspect.Parameter.empty


# Loading


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Load a config and apply overrides; return a locked `ConfigDict`.

    Args:
      spec: `FILE.py` or `FILE.py:ARG` (calls the file's `get_config()` or `get_config("ARG")`), a `.json` file, or a run folder (its
        `config.json`).
      overrides: dotted key -> value: `{"optimizer.learning_rate": 3e-4}`.

    Raises:
      ConfigError: the file is missing, has no `get_config`, or raises; or an override addresses a key below a plain value.
    """
    values = _load_values(*split_spec(spec))
    for key, value in (overrides or {}).items():
        set_at(values, key, value)
    return ConfigDict(values).lock()


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split `FILE[:ARG]` into (file, argument). An existing file whose name contains a colon is not split."""
    if re.match(r"\w+://", spec):
        place = storage.parse(spec, "--config")
        return str(place), None
    if ":" in spec and not os.path.exists(spec):
        path, _, argument = spec.partition(":")
        return path, argument
    return spec, None


def _load_values(path: str, argument: str | None) -> dict:
    if storage.is_bucket(path):
        return _load_remote(storage.parse(path))
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        names = sorted(n for n in os.listdir(folder) if n.endswith(".py")) if os.path.isdir(folder) else []
        raise ConfigError(f"--config: there is no file {path!r}." + suggest(os.path.basename(path), names))
    if path.endswith(".json"):
        if argument is not None:
            raise ConfigError(f"--config: {path} takes no argument, but got {argument!r}.")
        with open(path, encoding="utf-8") as file:
            try:
                config = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"--config: {path} is not valid JSON: {error}.") from error
    else:
        config = _call_get_config(path, argument)
    if isinstance(config, ConfigDict):
        return config.to_dict()
    if not isinstance(config, Mapping):
        raise ConfigError(f"--config: {path} must return a ConfigDict or a dictionary, got {config!r}.")
    return dict(config)


def _load_remote(place: Any) -> dict:
    """Return the config in a run's folder in a bucket, or in a JSON file there. A Python file is not executed from there."""
    file = place if place.suffix == ".json" else place / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"--config: there is no {file}; in a bucket, --config is a run folder or a JSON file.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--config: {file} does not contain a config.")
    return config


def _call_get_config(path: str, argument: str | None) -> Any:
    """Call a config file's `get_config`; raise a ConfigError with the line of any exception."""
    try:
        get_config = runpy.run_path(path).get("get_config")
        if not callable(get_config):
            raise ConfigError(f"--config: {path} defines no function get_config(); it must return an ml_collections.ConfigDict.")
        parameters = inspect.signature(get_config).parameters.values()
        if argument is not None and not parameters:
            raise ConfigError(f"--config: get_config() of {path} takes no argument, but got {argument!r}.")
        if argument is None and any(p.default is p.empty for p in parameters):
            raise ConfigError(f"--config: get_config() of {path} needs an argument: --config={path}:ARGUMENT.")
        return get_config(argument) if argument is not None else get_config()
    except ConfigError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
        where = f"{path}, line {line}" if line else path
        raise ConfigError(f"--config: {where}: {type(error).__name__}: {error}") from error


def parse_override(text: str) -> Any:
    """Parse the value of a command-line override: a Python literal, `true`, `false`, `none` or `null`; anything else is a string."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def set_at(values: dict, key: str, value: Any) -> None:
    """Set a dotted key in nested dictionaries; create missing sections."""
    *sections, last = key.split(".")
    for depth, name in enumerate(sections):
        inner = values.get(name)
        if isinstance(inner, str):
            inner = {"name": inner}  # the short form of a section: schedule="cosine"
        values[name] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            above = ".".join(sections[: depth + 1])
            raise ConfigError(f"--config.{key}: config.{above} is the value {inner!r}, not a section.")
        values = inner
    values[last] = value


# Checking


def fields(constructor: Callable, framework: tuple[str, ...] | None = None) -> dict[str, tuple[Any, Any]]:
    """Return the keys that a constructor takes from a config: name -> (annotation, default or REQUIRED).

    Args:
      constructor: a class or a function.
      framework: names of parameters that the framework passes; all others are keys. Unless given, the keys are the keyword-only
        parameters, and others that have a default, but for `rngs`; the framework passes the rest.
    """
    call = constructor.__init__ if inspect.isclass(constructor) else constructor
    hints = typing.get_type_hints(call)
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(call).parameters.items()
        if (
            name != "rngs" and (parameter.kind is parameter.KEYWORD_ONLY or _has_default(parameter))
            if framework is None
            else parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and name not in ("self", *framework)
        )
    }


def positional(constructor: Callable) -> list[str]:
    """Return the names of a constructor's positional parameters without a default, `self` and `rngs` left out."""
    call = constructor.__init__ if inspect.isclass(constructor) else constructor
    names = [
        name
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and not _has_default(parameter) and name != "rngs"
    ]
    return names[1:] if inspect.isclass(constructor) else names


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty


def check_keys(where: str, values: Mapping, allowed: Mapping[str, Any], given: str) -> None:
    """Check the keys of a section that is configured by a name.

    An override of the name alone (`--config.model.name=resnet18`) leaves the config file's keys, which belong to another model.
    So all keys that do not fit are listed, with the override that starts the section anew.

    Args:
      where: the section: `model`, `task` or `optimizer`.
      values: its keys.
      allowed: the keys that it may hold.
      given: what the section configures: `the model 'cnn'`.

    Raises:
      ConfigError: a key is not allowed.
    """
    unknown = [key for key in values if key not in allowed]
    if len(unknown) == 1 and suggest(unknown[0], allowed):
        raise ConfigError(f"config.{where}.{unknown[0]}: {given} has no such key.{suggest(unknown[0], allowed)}")
    if unknown:
        name = given.split("'")[1]
        raise ConfigError(
            f"config.{where}: {given} has no {', '.join(unknown)}. It has: {', '.join(key for key in allowed if key != 'name')}. "
            f"--config.{where}={name} in place of --config.{where}.name={name} drops the config file's keys of this section; set those needed after it."
        )


def check_section(where: str, values: Mapping, allowed: Mapping[str, tuple[Any, Any]], given: str) -> dict:
    """Return a section with defaults filled in and types checked, in the order of `allowed`.

    Args:
      where: dotted name of the section, for errors.
      values: the section in the config.
      allowed: name -> (annotation, default), as `fields` returns.
      given: what the section configures, for errors: `the optimizer 'adamw'`.

    Raises:
      ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.{where} must be a section of keys, got {values!r}.")
    for key in values:
        if key not in allowed:
            hint = suggest(key, allowed) or f" It has: {', '.join(allowed)}."
            raise ConfigError(f"config.{where}.{key}: {given} has no such key.{hint}")
    checked = {}
    for key, (annotation, default) in allowed.items():
        if key in values:
            checked[key] = check_value(f"{where}.{key}", values[key], annotation)
        elif default is REQUIRED:
            raise ConfigError(f"config.{where}.{key} is required by {given}; set it, e.g. --config.{where}.{key}=VALUE.")
        else:
            # Defaults are converted like given values, so that a default equals its copy from JSON.
            checked[key] = check_value(f"{where}.{key}", default, annotation)
    return checked


def check_value(where: str, value: Any, annotation: Any) -> Any:
    """Return the value converted to the annotation (int to float, list to tuple, dictionary to section); ConfigError if it does not fit."""
    converted, ok = _convert(where, value, annotation)
    if not ok:
        raise ConfigError(
            f"config.{where} must be {describe(annotation)}, got {value!r} ({type(value).__name__})."
            + (suggest(value, [c for c in typing.get_args(annotation) if isinstance(c, str)]) if isinstance(value, str) else "")
        )
    return converted


def _convert(where: str, value: Any, annotation: Any) -> tuple[Any, bool]:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value, True
    if annotation is None or annotation is type(None):
        return None, value is None
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda option: value is None and option is not type(None)):
            converted, ok = _convert(where, value, option)
            if ok:
                return converted, True
        return value, False
    if origin is typing.Literal:
        if value is None and "none" in args:
            return "none", True  # `--config.model.remat=none` is parsed as None
        return value, any(value == a and type(value) is type(a) for a in args)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        if isinstance(value, annotation):
            value = dataclasses.asdict(value)
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            value = {next(iter(fields(annotation))): value}  # the short form, its first key: schedule="cosine"
        if not isinstance(value, Mapping):
            return value, False
        return check_section(where, value, fields(annotation), where), True
    if annotation is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (float(value) if ok else value), ok
    if annotation is int:
        return value, isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return value, False
        items = [_convert(where, item, args[0]) for item in value]
        return tuple(item for item, _ in items), all(ok for _, ok in items)
    if origin in (dict, collections.abc.Mapping):
        return (dict(value), True) if isinstance(value, Mapping) else (value, False)
    return value, isinstance(value, annotation)


def describe(annotation: Any, *, plural: bool = False) -> str:
    """Return the values that an annotation allows, in words: `a whole number or none`."""
    args = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a, plural=plural) for a in args)
    if origin is tuple:
        return f"{'lists' if plural else 'a list'} of {describe(args[0], plural=True)}"
    if origin in (dict, collections.abc.Mapping):
        return "dictionaries" if plural else "a dictionary"
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return f"a section ({', '.join(fields(annotation))})"
    singular, many = _WORDS.get(annotation, (getattr(annotation, "__name__", str(annotation)),) * 2)
    return many if plural else singular


_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true or false", "true or false"),
    type(None): ("none", "none"),
    Any: ("any value", "values"),
}


def suggest(wrong: str, names) -> str:
    """Return ` Did you mean ...?` with the most similar of `names`; an empty string if none is similar."""
    close = difflib.get_close_matches(str(wrong), list(names), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def find(kind: str, table: Mapping[str, str], name: str) -> Any:
    """Import the function or class that `name` stands for.

    Args:
      kind: the config key that holds the name, for errors: `model.name`.
      table: name -> `package.module:object`.
      name: a key of `table`, or the user's own `package.module:object`.

    Raises:
      ConfigError: an unknown name (the message lists the table), or an object that cannot be imported.
    """
    place = table.get(name, name if ":" in str(name) else None)
    if place is None:
        raise ConfigError(
            f"config.{kind}: there is no {kind.split('.')[0]} {name!r}.{suggest(name, table)} "
            f"There are: {', '.join(sorted(table))}; or give your own as 'package.module:name'."
        )
    module, _, attribute = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"config.{kind}: cannot import {place!r}: {error}") from error
    if not (inspect.isfunction(found) or inspect.isclass(found)):
        raise ConfigError(f"config.{kind}: {place!r} is neither a function nor a class.")
    return found


# Comparing


def flatten(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys; an empty section is kept as a value."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differences(one: Mapping, other: Mapping) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys that differ: key -> (value in `one`, value in `other`), '(absent)' for a missing key."""
    flat, flat_other = flatten(one), flatten(other)
    return {
        key: (flat.get(key, "(absent)"), flat_other.get(key, "(absent)"))
        for key in sorted(flat.keys() | flat_other.keys())
        if flat.get(key, "(absent)") != flat_other.get(key, "(absent)")
    }


def origins(spec: str, overrides: Mapping[str, Any], resolved: Mapping) -> dict[str, str]:
    """Return the origin of each value of a resolved config: `default`, `file`, `argument` or `override`.

    A value's origin is `argument` if the file, called without its argument, sets another value or none.
    """
    path, argument = split_spec(spec)
    given = flatten(_load_values(path, argument))
    without = given
    if argument is not None:
        try:
            without = flatten(_load_values(path, None))
        except ConfigError:  # get_config() requires its argument: every value depends on it
            without = {}
    given, without, overrides = (_by_first_key(values, resolved) for values in (given, without, overrides))
    result = {}
    for key in flatten(resolved):
        inside = [k for k in (*given, *overrides) if k == key or key.startswith(k + ".")]
        if any(k in overrides for k in inside):
            result[key] = "override"
        elif not inside:
            result[key] = "default"
        else:
            result[key] = "file" if all(without.get(k) == given[k] and k in without for k in inside) else "argument"
    return result


def _by_first_key(flat: Mapping[str, Any], resolved: Mapping) -> dict[str, Any]:
    """Return dotted keys with short forms of sections expanded: `task` becomes `task.name`."""
    result = {}
    for key, value in flat.items():
        section: Any = resolved
        for name in key.split("."):
            section = section.get(name) if isinstance(section, Mapping) else None
        whole = isinstance(section, Mapping) and section and not isinstance(value, Mapping)
        result[f"{key}.{next(iter(section))}" if whole else key] = value
    return result
