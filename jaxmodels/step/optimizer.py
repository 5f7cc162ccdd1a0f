"""Optimizers by name: those of Optax, of `optax.contrib`, and a user's own."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from optax import contrib

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError
from jaxmodels.step import muon, rates
from jaxmodels.step import schedule as schedule_lib
from jaxmodels.step.parameters import check_matches, check_pattern, matches, path_name
from jaxmodels.step.rates import LayerDecay, Rates
from jaxmodels.step.schedule import OwnSchedule, Schedule

# Biases and the scales of normalization layers are not decayed, also where they are stacked by layer.
NO_DECAY = (r"bias$", r"scale$")

# Functions of Optax that this train step cannot use. It computes one gradient of a batch, and updates the parameters once.
_CALLS_LOSS = "it evaluates the loss again within an update"
_PER_EXAMPLE = "it needs the gradient of each example, and the train step has that of the batch"
_WRAPPER = "it wraps another optimizer, which a config cannot name; write a function that returns both, as package.module:function"
_AVERAGED = "it is evaluated at other parameters than those it trains; use schedule='constant' or 'wsd' with training.ema"
_NO_RATE = "it takes no learning rate schedule"
UNSUPPORTED = {
    "lbfgs": _CALLS_LOSS,
    "sophia": _CALLS_LOSS,
    "hutchinson_estimator_diag_hessian": _CALLS_LOSS,
    "dpsgd": _PER_EXAMPLE,
    "differentially_private_aggregate": _PER_EXAMPLE,
    "sam": _WRAPPER,
    "mechanize": _WRAPPER,
    "split_real_and_imaginary": _WRAPPER,
    "lookahead": _WRAPPER,
    "reduce_on_plateau": _WRAPPER,
    "schedule_free": _AVERAGED,
    "schedule_free_adamw": _AVERAGED,
    "schedule_free_sgd": _AVERAGED,
    "optimistic_adam": _NO_RATE + "; use 'optimistic_adam_v2'",
    "polyak_sgd": _NO_RATE,
    "rprop": _NO_RATE,
    "sm3": _NO_RATE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The `optimizer` section. All other keys are arguments of the function that `name` means.

    `name` may be `package.module:function`. The function has a parameter `learning_rate`, which receives the Optax schedule (step ->
    learning rate), and returns an `optax.GradientTransformation`. Its other parameters are keys of the section. If it has a
    parameter `weight_decay`, it receives that key; a parameter `mask` or `weight_decay_mask` receives a function from the parameters
    to a tree of bools that follows `no_decay`. Its update receives the loss of the batch as `value`.

    Attributes:
      name: an optimizer of `optax` or `optax.contrib`: `adamw`, `sgd`, `lion`, `muon`, …; or a function of one's own.
      learning_rate: the peak.
      schedule: factor on the learning rate as a function of the step.
      weight_decay: passed to an optimizer that has a `weight_decay` (in AdamW it is decoupled). For the others it is
        added to the gradient (L2). None keeps the optimizer's default.
      no_decay: patterns; parameters whose path matches one anywhere are not decayed.
      clip_norm: upper limit of the gradient's global norm; a larger gradient is scaled down to it.
      rates: pairs (pattern, factor). A parameter's learning rate is multiplied with the factor of the first pattern that
        matches its path anywhere, or with 1.
      layer_decay: further factors, by layer.
    """

    name: str
    learning_rate: float
    schedule: Schedule | OwnSchedule = Schedule()
    weight_decay: float | None = None
    no_decay: tuple[str, ...] = NO_DECAY
    clip_norm: float | None = None
    rates: Rates = ()
    layer_decay: LayerDecay | None = None


def names() -> list[str]:
    """Return the names of all optimizers of Optax: its functions with a learning rate that may be a schedule."""
    return sorted(_functions())


def _functions() -> dict[str, Callable]:
    found = {}
    for module in (contrib, optax):  # a name in both is that of `optax`
        for name, value in vars(module).items():
            if not inspect.isfunction(value) or name.startswith(("_", "scale_by_")) or name in UNSUPPORTED:
                continue
            rate = inspect.signature(value).parameters.get("learning_rate")
            if rate is not None and ("Callable" in str(rate.annotation) or "Schedule" in str(rate.annotation)):
                found[name] = value
    return found


def find(name: str) -> Callable:
    """Return the function that makes an optimizer.

    Raises:
      ConfigError: there is none of that name, or the train step cannot use it; the message says why.
    """
    known = _functions()
    if name in known:
        return known[name]
    if name in UNSUPPORTED:
        raise ConfigError(f"config.optimizer.name: {name!r} of Optax cannot be used here: {UNSUPPORTED[name]}.")
    if ":" not in name:
        raise ConfigError(
            f"config.optimizer.name: Optax has no optimizer {name!r}.{config_lib.suggest(name, known)} "
            f"There are: {', '.join(sorted(known))}; or give your own as 'package.module:function'."
        )
    function = config_lib.find("optimizer.name", {}, name)
    parameters = inspect.signature(function).parameters
    if "learning_rate" not in parameters:
        raise ConfigError(f"config.optimizer.name: {name!r} must have a parameter learning_rate, for the schedule; it has ({', '.join(parameters)}).")
    taken = [key for key in parameters if key in _section_keys() - {"learning_rate", "weight_decay"}]
    if taken:
        raise ConfigError(f"config.optimizer.name: {name!r} has a parameter {taken[0]!r}, which is a key of the section already; rename it.")
    return function


def _section_keys() -> set[str]:
    return {field.name for field in dataclasses.fields(Optimizer)}


def own_arguments(name: str) -> dict[str, tuple[Any, Any]]:
    """Return the keys of an optimizer that `Optimizer` does not have: name -> (type, default).

    Raises:
      ConfigError: as `find`.
    """
    function = find(name)
    set_here = _section_keys() | {"mask", "weight_decay_mask"} | (set(muon.SET_HERE) if name == "muon" else set())
    # Optax annotates numbers as arrays, so the types of its defaults tell more; a function of the user's is as annotated.
    hints = typing.get_type_hints(function) if ":" in name else {}
    keys = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if key in set_here or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        by_default = type(parameter.default) if type(parameter.default) in (bool, int, float) else Any
        keys[key] = (hints.get(key, by_default), parameter.default)
    return keys | (muon.KEYS if name == "muon" else {})


def resolve(section: Mapping) -> dict:
    """Return the `optimizer` section with its defaults and with checked types.

    Defaults of the optimizer's own arguments stay out: the config holds only those that are given.

    Raises:
      ConfigError: an unknown name, an unknown or missing key, or a wrong type.
    """
    name = config_lib.check_value("optimizer.name", section["name"], str)
    own, shared = own_arguments(name), config_lib.fields(Optimizer)
    for key, (_, default) in own.items():
        if default is config_lib.REQUIRED and key not in section:
            raise ConfigError(f"config.optimizer.{key} is required by the optimizer {name!r}; set it, e.g. --config.optimizer.{key}=VALUE.")
    config_lib.check_keys("optimizer", section, shared | own, f"the optimizer {name!r}")
    section = dict(section) | {"schedule": schedule_lib.resolve(section.get("schedule", {}))}
    allowed = shared | {"schedule": (dict, None)} | {key: own[key] for key in own if key in section}
    return config_lib.check_section("optimizer", section, allowed, f"the optimizer {name!r}")


def from_section(section: Mapping) -> tuple[Optimizer, dict[str, Any]]:
    """Return a resolved section as its own keys and the arguments of the optimizer's function."""
    values = {key: section[key] for key in config_lib.fields(Optimizer)}
    values["schedule"] = schedule_lib.from_section(values["schedule"])
    if values["layer_decay"] is not None:
        values["layer_decay"] = LayerDecay(**values["layer_decay"])
    return Optimizer(**values), {key: value for key, value in section.items() if key not in values}


def make_optimizer(options: Optimizer, own: Mapping[str, Any], schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Return the chain of clipping, L2 (for an optimizer without weight decay), the optimizer, and learning rates by parameter.

    Its update takes the loss of the batch as `value`, which some optimizers use.

    Args:
      options: the section.
      own: arguments of the optimizer's function.
      schedule: step -> learning rate.

    Raises:
      ConfigError: a function of the user's returns no gradient transformation.
    """
    function = find(options.name)
    parameters = inspect.signature(function).parameters
    # JSON has no tuples, and Optax's arguments have no types that would tell. A user's are converted as they are annotated.
    to_tuple = ":" not in options.name
    arguments = {key: tuple(value) if to_tuple and isinstance(value, list) else value for key, value in own.items()}
    parts = []
    if options.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(options.clip_norm))

    def mask(params):
        return decay_mask(params, options.no_decay)

    if options.name == "muon":
        parts.append(muon.make_muon(arguments, options.learning_rate, schedule, options.weight_decay or 0.0, mask))
    else:
        if "weight_decay" not in parameters and options.weight_decay:
            parts.append(optax.add_decayed_weights(options.weight_decay, mask))
        elif "weight_decay" in parameters and options.weight_decay is not None:
            arguments["weight_decay"] = options.weight_decay
        if mask_name := _mask_name(parameters):
            arguments[mask_name] = mask
        made = function(learning_rate=schedule, **arguments)
        if not isinstance(made, optax.GradientTransformation):
            raise ConfigError(f"config.optimizer.name: {options.name!r} must return an optax.GradientTransformation, got {made!r}.")
        parts.append(made)
    if options.rates or options.layer_decay is not None:
        parts.append(rates.scale_updates(options.rates, options.layer_decay))
    return optax.with_extra_args_support(optax.chain(*parts))


def _mask_name(parameters: Mapping) -> str | None:
    """Return the name of the argument of an optimizer's function that selects the decayed parameters."""
    if "weight_decay" not in parameters:
        return None
    return next((name for name in ("mask", "weight_decay_mask") if name in parameters), None)


def check(options: Optimizer, own: Mapping[str, Any], steps: int, params: Any) -> None:
    """Check that the section makes an optimizer for the trained parameters.

    Args:
      options: the section.
      own: arguments of the optimizer's function.
      steps: length of the run.
      params: arrays or their shapes.

    Raises:
      ConfigError: a value out of range, a pattern that matches nothing, or arguments that the optimizer rejects.
    """
    for key in ("learning_rate", "clip_norm"):
        value = getattr(options, key)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"config.optimizer.{key} must be above 0 and finite, got {value}.")
    if options.weight_decay is not None and not 0 <= options.weight_decay < math.inf:
        raise ConfigError(f"config.optimizer.weight_decay must not be negative, got {options.weight_decay}.")
    schedule_lib.check(options.schedule, options.learning_rate, steps)
    for pattern in options.no_decay:
        check_pattern("optimizer.no_decay", pattern)
        if pattern not in NO_DECAY:
            check_matches("optimizer.no_decay", pattern, params)
    parameters = inspect.signature(find(options.name)).parameters
    if options.no_decay != NO_DECAY and options.weight_decay and "weight_decay" in parameters and not _mask_name(parameters):
        raise ConfigError(f"config.optimizer.no_decay: {options.name!r} decays all parameters; it has no argument to leave some out.")
    rates.check(options.rates, options.layer_decay, params)
    if options.name == "muon":
        muon.check(own, params)
    try:
        schedule = schedule_lib.make_schedule(options.learning_rate, options.schedule, steps)
        jax.eval_shape(make_optimizer(options, own, schedule).init, params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.optimizer: {options.name!r} rejects its arguments: {error}") from error


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """Return a tree of bools: whether a parameter is decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not matches(no_decay, path_name(path)), params)
