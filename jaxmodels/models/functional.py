"""Flax NNX modules as pure functions: split into a graph and nested dictionaries of arrays, and merged again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def split(model: nnx.Module) -> tuple[Any, dict, dict]:
    """A module as (graph, params, stats), the last two plain nested dicts with string keys."""
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    return graph, _string_keys(nnx.to_pure_dict(params)), _string_keys(nnx.to_pure_dict(stats))


def merge(graph, params: dict, stats: dict) -> nnx.Module:
    """The module again."""
    return nnx.merge(graph, _own_keys(params), _own_keys(stats))


def divide(params: dict, trained: Callable[[str], bool]) -> tuple[dict, dict]:
    """Parameters as (those to train, the frozen ones), by their paths."""
    flat = flatten(params)
    parts = {True: {}, False: {}}
    for path, value in flat.items():
        parts[bool(trained(path))][path] = value
    return unflatten(parts[True]), unflatten(parts[False])


def join(params: dict, frozen: dict) -> dict:
    """The two parts of `divide` as one again."""
    return unflatten(flatten(params) | flatten(frozen)) if frozen else params


def flatten(tree) -> dict:
    """Nested dictionaries as one, with paths such as `blocks/0/mlp/up/kernel`."""
    return traverse_util.flatten_dict(tree or {}, sep="/")


def unflatten(flat: dict) -> dict:
    """Nested dictionaries again."""
    return traverse_util.unflatten_dict(flat, sep="/")


def _string_keys(tree):
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _own_keys(tree):
    """Places in a list as the numbers they are: NNX goes by their order, and as strings "10" comes before "2"."""
    return {int(k) if k.isdigit() else k: _own_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def cast(tree, dtype):
    """Floating-point arrays as `dtype`; others as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def evaluation_model(graph, params, stats, dtype=jnp.float32) -> nnx.Module:
    """The module in evaluation mode: norms use their running statistics."""
    model = merge(graph, cast(params, dtype), stats)
    model.eval()
    return model
