"""Any Optax optimizer by name, with a schedule, clipping and weight decay by parameter path."""

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.config import suggest
from jaxmodels.errors import ConfigError

# Biases and the scales of normalisations are not decayed, whatever the model stacks them in.
NO_DECAY = (r"bias$", r"scale$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate goes over a run of N steps; it is multiplied with `learning_rate`.

    Attributes:
      name: after the warm-up, `constant` stays at 1; `linear` and `cosine` fall to `final` at step N; `wsd` (warm-up,
        stable, decay: Hu et al. 2024) stays at 1 and falls linearly to `final` over the last `decay` steps;
        `inverse_sqrt` is the square root of (`warmup`, or 1) / step.
      warmup: steps that rise linearly from 0 to 1.
      decay: of `wsd`: its last steps; a tenth of the run unless given.
      final: what is left at the end.
    """

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    warmup: int = 0
    decay: int | None = None
    final: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDecay:
    """Lower learning rates for lower layers (Howard and Ruder 2018; Clark et al. 2020).

    Of n layers that are trained, layer i (from 0) learns at rate^(n - i) of the learning rate, what `last` names at all of it, and all
    else, which lies before the layers, at rate^(n + 1).

    Attributes:
      rate: below 1.
      layers: a pattern on parameter paths whose group is the number of the layer; where the group is empty, the array
        holds all layers, stacked along its first axis.
      last: patterns on what comes after the layers.
    """

    rate: float
    layers: str = r"blocks/(?:(\d+)/)?"
    last: tuple[str, ...] = (r"(^|/)head/", r"(^|/)final_norm/", r"^norm/", r"(^|/)output/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The `optimizer` section. All other keys are arguments of the Optax optimizer.

    Attributes:
      name: a function of `optax` that takes a learning rate: `adamw`, `sgd`, `lion`, …
      learning_rate: the peak.
      schedule: its course.
      weight_decay: for optimizers with a `weight_decay` of their own, that (AdamW's: decoupled); for the others it is
        added to the gradient (L2). None leaves the optimizer's default.
      no_decay: patterns; parameters whose path matches one (anywhere in it) are not decayed.
      clip_norm: gradients whose global norm is above are scaled down to it.
      rates: pairs (pattern, factor): a parameter learns at the factor of the first pattern that its path matches (anywhere
        in it) times the learning rate; at 1 where none does.
      layer_decay: further factors, by layer.
    """

    name: str
    learning_rate: float
    schedule: Schedule = Schedule()
    weight_decay: float | None = None
    no_decay: tuple[str, ...] = NO_DECAY
    clip_norm: float | None = None
    rates: tuple[tuple[Any, ...], ...] = ()
    layer_decay: LayerDecay | None = None


def names() -> list[str]:
    """All optimizers that Optax has: its functions with a learning rate that may be a schedule.

    Without L-BFGS, which calls the loss again as it searches along a line: no step here gives it that.
    """
    found = []
    for name in dir(optax):
        value = getattr(optax, name)
        if inspect.isfunction(value) and not name.startswith(("_", "scale_by_", "lbfgs")):
            rate = inspect.signature(value).parameters.get("learning_rate")
            if rate is not None and ("Callable" in str(rate.annotation) or "Schedule" in str(rate.annotation)):
                found.append(name)
    return found


def own_arguments(name: str) -> dict[str, tuple[Any, Any]]:
    """Arguments of an Optax optimizer besides those of `Optimizer`: name -> (annotation, default).

    Raises:
      ConfigError: there is no such optimizer; lists them.
    """
    known = names()
    if name not in known:
        raise ConfigError(f"config.optimizer.name: Optax has no optimizer {name!r}.{suggest(name, known)} There are: {', '.join(known)}.")
    ours = {field.name for field in dataclasses.fields(Optimizer)} | {"mask", "weight_decay_mask"}
    return {
        argument: (type(parameter.default) if type(parameter.default) in (bool, int, float) else Any, parameter.default)
        for argument, parameter in inspect.signature(getattr(optax, name)).parameters.items()
        if argument not in ours and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def make_schedule(learning_rate: float, schedule: Schedule, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    Raises:
      ConfigError: the warm-up and the decay do not fit into the run.
    """
    after = steps - schedule.warmup
    if after < 1 or schedule.warmup < 0:
        raise ConfigError(f"config.optimizer.schedule.warmup={schedule.warmup} leaves nothing of a run of {steps} steps.")
    if schedule.name == "constant":
        main = optax.constant_schedule(1.0)
    elif schedule.name == "linear":
        main = optax.linear_schedule(1.0, schedule.final, after)
    elif schedule.name == "cosine":
        main = optax.cosine_decay_schedule(1.0, after, schedule.final)
    elif schedule.name == "wsd":
        decay = schedule.decay if schedule.decay is not None else max(1, steps // 10)
        if not 0 < decay <= after:
            raise ConfigError(f"config.optimizer.schedule.decay={decay} must lie between 1 and the {after} steps after the warm-up.")
        main = optax.join_schedules([optax.constant_schedule(1.0), optax.linear_schedule(1.0, schedule.final, decay)], [after - decay])
    else:
        scale = max(1, schedule.warmup)
        main = lambda step: (scale / (jnp.maximum(step, 0) + scale)) ** 0.5  # noqa: E731
    if schedule.warmup:
        # The first step is already above 0: a step that changes nothing is a wasted one.
        warmup = lambda step: (step + 1) / schedule.warmup  # noqa: E731
        main = optax.join_schedules([warmup, main], [schedule.warmup])
    return lambda step: learning_rate * main(step)


def make_optimizer(options: Optimizer, own: Mapping[str, Any], schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then weight decay where the optimizer has none of its own, then the optimizer.

    Args:
      options: the section.
      own: further arguments of the Optax function.
      schedule: of the learning rate.
    """
    function = getattr(optax, options.name)
    parameters = inspect.signature(function).parameters
    arguments = dict(own)
    parts = []
    if options.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(options.clip_norm))

    def mask(params):
        return decay_mask(params, options.no_decay)

    mask_name = next((m for m in ("mask", "weight_decay_mask") if m in parameters), None)
    if "weight_decay" in parameters:
        if options.weight_decay is not None:
            arguments["weight_decay"] = options.weight_decay
        if mask_name:
            arguments[mask_name] = mask
    elif options.weight_decay:
        parts.append(optax.add_decayed_weights(options.weight_decay, mask))
    parts.append(function(learning_rate=schedule, **arguments))
    if options.rates or options.layer_decay is not None:
        parts.append(optax.stateless(lambda updates, params: jax.tree.map(lambda u, f: u * f.astype(u.dtype), updates, rate_factors(params, options))))
    return optax.chain(*parts)


def rate_factors(params: Any, options: Optimizer) -> Any:
    """What each parameter's learning rate is multiplied by: a tree of arrays that broadcast against the parameters."""

    def factor(path, x):
        name = path_name(path)
        own = next((float(value) for pattern, value in options.rates if re.search(pattern, name)), 1.0)
        by_layer = 1.0 if options.layer_decay is None else _layer_factor(name, x, options.layer_decay, count)
        return jnp.asarray(own * by_layer, jnp.float32)

    leaves = jax.tree_util.tree_leaves_with_path(params)
    count = _count_layers(leaves, options.layer_decay) if options.layer_decay is not None else 0
    return jax.tree_util.tree_map_with_path(factor, params)


def _count_layers(leaves, decay: LayerDecay) -> int:
    """How many layers there are, by their numbers or by the first axis of stacks."""
    found = [(re.search(decay.layers, path_name(path)), x) for path, x in leaves]
    return max((x.shape[0] if match[1] is None else int(match[1]) + 1 for match, x in found if match), default=0)


def _layer_factor(name: str, x, decay: LayerDecay, count: int):
    match = re.search(decay.layers, name)
    if match and match[1] is None:
        return (decay.rate ** (count - np.arange(count, dtype=np.float32))).reshape(-1, *[1] * (x.ndim - 1))
    if match:
        return decay.rate ** (count - int(match[1]))
    return 1.0 if any(re.search(pattern, name) for pattern in decay.last) else decay.rate ** (count + 1)


def check(options: Optimizer, own: Mapping[str, Any], steps: int, params: Any) -> None:
    """Raises ConfigError if the section cannot make an optimizer for these parameters (shapes will do)."""
    for key in ("learning_rate", "clip_norm"):
        value = getattr(options, key)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"config.optimizer.{key} must be above 0 and finite, got {value}.")
    if options.weight_decay is not None and not 0 <= options.weight_decay < math.inf:
        raise ConfigError(f"config.optimizer.weight_decay must not be negative, got {options.weight_decay}.")
    _check_schedule(options.schedule)
    schedule = make_schedule(options.learning_rate, options.schedule, steps)
    for pattern in options.no_decay:
        check_pattern("optimizer.no_decay", pattern)
        if not any(re.search(pattern, path) for path in paths(params)) and pattern not in NO_DECAY:
            raise ConfigError(f"config.optimizer.no_decay: {pattern!r} matches no parameter; there are {', '.join(paths(params)[:8])}, …")
    _check_rates(options, params)
    try:
        jax.eval_shape(make_optimizer(options, own, schedule).init, params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.optimizer: optax.{options.name} refuses its arguments: {error}") from error


def _check_rates(options: Optimizer, params: Any) -> None:
    """Patterns of learning rates mean parameters, and factors are numbers."""
    for pair in options.rates:
        if len(pair) != 2 or not isinstance(pair[0], str) or isinstance(pair[1], bool) or not isinstance(pair[1], int | float) or pair[1] < 0:
            raise ConfigError(f"config.optimizer.rates holds pairs (pattern, factor), got {pair!r}.")
        check_pattern("optimizer.rates", pair[0])
        if not any(re.search(pair[0], path) for path in paths(params)):
            raise ConfigError(f"config.optimizer.rates: {pair[0]!r} matches no trained parameter; there are {', '.join(paths(params)[:8])}, …")
    decay = options.layer_decay
    if decay is None:
        return
    if not 0 < decay.rate <= 1:
        raise ConfigError(f"config.optimizer.layer_decay.rate must lie above 0 and be at most 1, got {decay.rate}.")
    for key, patterns in (("layers", (decay.layers,)), ("last", decay.last)):
        for pattern in patterns:
            check_pattern(f"optimizer.layer_decay.{key}", pattern)
    if re.compile(decay.layers).groups != 1:
        raise ConfigError(f"config.optimizer.layer_decay.layers: {decay.layers!r} must have one group, the number of the layer.")
    if twice := next((path for path in paths(params) if re.search(decay.layers + r"\d+/", path)), None):
        raise ConfigError(f"config.optimizer.layer_decay.layers: {twice} has more numbers than {decay.layers!r} has groups: say which one counts layers.")
    if not _count_layers(jax.tree_util.tree_leaves_with_path(params), decay):
        raise ConfigError(f"config.optimizer.layer_decay.layers: {decay.layers!r} matches no trained parameter; there are {', '.join(paths(params)[:8])}, …")


def _check_schedule(schedule: Schedule) -> None:
    """What a schedule does not use is not silently passed over."""
    if not 0 <= schedule.final <= 1:
        raise ConfigError(f"config.optimizer.schedule.final is a share between 0 and 1, got {schedule.final}.")
    if schedule.final and schedule.name in ("constant", "inverse_sqrt"):
        raise ConfigError(f"config.optimizer.schedule.final means nothing to {schedule.name!r}.")
    if schedule.decay is not None and schedule.name != "wsd":
        raise ConfigError(f"config.optimizer.schedule.decay means nothing to {schedule.name!r}; only 'wsd' has it.")


def check_pattern(where: str, pattern: str) -> None:
    """Raises ConfigError for what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"config.{where}: {pattern!r} is not a regular expression: {error}.") from error


def paths(params: Any) -> list[str]:
    """Every parameter's path, `blocks/0/mlp/up/kernel`, in the order of the tree's leaves."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def path_name(path) -> str:
    """A key path of `jax.tree_util` as one string with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """A tree of bools: which parameters are decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not any(re.search(p, path_name(path)) for p in no_decay), params)
