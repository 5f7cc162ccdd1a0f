"""Paths of parameters, and the patterns on them that a config holds."""

import re
from typing import Any

import jax

from jaxmodels.errors import ConfigError


def paths(params: Any) -> list[str]:
    """Return the path of each parameter, such as `blocks/0/mlp/up/kernel`, in the order of the tree's leaves."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def path_name(path) -> str:
    """Return a key path of `jax.tree_util` as one string with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matches(patterns: tuple[str, ...], path: str) -> bool:
    """Return whether one of the patterns matches anywhere in the path."""
    return any(re.search(pattern, path) for pattern in patterns)


def check_pattern(key: str, pattern: str) -> None:
    """Check a regular expression of the config.

    Raises:
      ConfigError: the pattern does not compile.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"config.{key}: {pattern!r} is not a regular expression: {error}.") from error


def check_matches(key: str, pattern: str, params: Any) -> None:
    """Check that a pattern of the config is valid and matches a parameter.

    Raises:
      ConfigError: it does not compile, or matches no path of `params`.
    """
    check_pattern(key, pattern)
    found = paths(params)
    if not any(re.search(pattern, path) for path in found):
        raise ConfigError(f"config.{key}: {pattern!r} matches no trained parameter; there are {', '.join(found[:8])}, …")
