"""The keys of a source, composed from those of its reader and its features."""

import functools
import inspect
import operator
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

from jaxmodels import config as config_lib


class Keys:
    """Base class of dataclasses whose fields are keys of a section."""

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Self:
        """Return an instance, from those keys of a section that are its fields."""
        return cls(**{name: keys[name] for name in config_lib.fields(cls) if name in keys})


def takes(
    *parts: type[Keys],
    without: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
    only_names: bool = False,
    **defaults: Any,
) -> Callable[[Callable], Callable]:
    """Give a source function the keys of its parts as keyword-only parameters, in place of its `**keys`.

    The function is called with all keys, defaults filled in. Its signature, annotations and docstring are those of a function that
    declares every key itself, so that a config is checked and explained by them.

    Args:
      parts: the keys; parts may share some.
      without: keys that the source sets itself.
      optional: required keys that are None by default in this source.
      required: optional keys that this source requires.
      only_names: whether columns are names and never numbers.
      defaults: default values of this source, in place of those of the parts.
    """

    def decorate(function: Callable) -> Callable:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        annotations = {name: hint for name, hint in typing.get_type_hints(function).items() if name != "keys"}
        added = {}
        for key, (annotation, default) in (item for part in parts for item in config_lib.fields(part).items()):
            if key in without:
                continue
            if key in optional:
                annotation, default = annotation | None, None
            if key in required:
                annotation, default = (
                    functools.reduce(operator.or_, (hint for hint in typing.get_args(annotation) if hint is not type(None))),
                    config_lib.REQUIRED,
                )
            if only_names and int in typing.get_args(annotation) and key.endswith("_column"):
                annotation = str | None if type(None) in typing.get_args(annotation) else str
            annotations[key] = annotation
            added[key] = inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(key, default), annotation=annotation)
        unknown = (defaults.keys() | set(optional)) - added.keys()
        if unknown:
            raise TypeError(f"{function.__name__}: no part has the keys {sorted(unknown)}")
        signature = inspect.Signature([*own, *added.values()])

        @functools.wraps(function)
        def source(*arguments, **keys):
            bound = signature.bind(*arguments, **keys)
            bound.apply_defaults()
            return function(*bound.args, **bound.kwargs)

        source.__signature__, source.__annotations__ = signature, annotations
        source.__doc__ = _with_keys(inspect.getdoc(function) or function.__name__, _documented(parts), added)
        return source

    return decorate


def _documented(parts: tuple[type[Keys], ...]) -> dict[str, str]:
    """Return key -> its lines in the docstring of a part."""
    found = {}
    for base in (base for part in parts for base in reversed(part.__mro__) if base.__doc__):
        block = re.search(r"(?ms)^Attributes:\n(.*?)(?:\n\S|\Z)", inspect.getdoc(base))
        for entry in re.findall(r"(?m)^  \S.*(?:\n    .*)*", block[1]) if block else ():
            found |= {name.strip(): entry for name in entry.partition(":")[0].split(",")}
    return found


def _with_keys(text: str, documented: Mapping[str, str], keys: Mapping[str, Any]) -> str:
    """Return a docstring with the keys after those in its section `Args:`."""
    lines = "\n".join(dict.fromkeys(documented[key] for key in keys if key in documented))
    head, args, rest = text.partition("\n\nArgs:\n")
    first, gap, after = rest.partition("\n\n")
    return head + (args or "\n\nArgs:\n") + (f"{first.rstrip()}\n" if first else "") + lines + gap + after
