"""Learning rate schedules: the section `optimizer.schedule`, and the Optax schedule that it describes."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxmodels import config as config_lib
from jaxmodels.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The `optimizer.schedule` section: a factor on `learning_rate` as a function of the step, in a run of N steps.

    `name` may also be `package.module:function`. The function is called as `function(learning_rate, steps, **keys)` with the peak
    learning rate and the length of the run, and returns an Optax schedule: step -> learning rate. The other parameters of the
    function are the keys of the section, in place of those below.

    Attributes:
      name: after the warm-up, `constant` stays at 1; `linear` and `cosine` fall to `final` at step N; `wsd` (warm-up,
        stable, decay: Hu et al. 2024) stays at 1 and falls linearly to `final` over the last `decay` steps;
        `inverse_sqrt` is the square root of (`warmup`, or 1) / step.
      warmup: number of first steps in which the factor rises linearly from 0 to 1.
      decay: number of last steps in which `wsd` falls. The default is a tenth of the run.
      final: factor at the end of the run, between 0 and 1.
    """

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    warmup: int = 0
    decay: int | None = None
    final: float = 0.0


@dataclasses.dataclass(frozen=True)
class OwnSchedule:
    """A schedule of the user's: the `package.module:function` that makes it, and the other keys of the section."""

    name: str
    keys: Mapping[str, Any]


def resolve(section: Any) -> dict:
    """Return the section with its defaults and with checked types.

    Args:
      section: the value of `optimizer.schedule`: keys, or the name alone.

    Raises:
      ConfigError: an unknown name, an unknown or missing key, or a wrong type.
    """
    name = section.get("name") if isinstance(section, Mapping) else section
    if not (isinstance(name, str) and ":" in name):
        return config_lib.check_value("optimizer.schedule", section, Schedule)
    keys = {key: value for key, value in section.items() if key != "name"} if isinstance(section, Mapping) else {}
    return {"name": name} | config_lib.check_section("optimizer.schedule", keys, _own_keys(name), f"the schedule {name!r}")


def from_section(section: Mapping) -> Schedule | OwnSchedule:
    """Return the schedule that a resolved section describes."""
    if ":" not in section["name"]:
        return Schedule(**section)
    return OwnSchedule(section["name"], {key: value for key, value in section.items() if key != "name"})


def _own_keys(name: str) -> dict[str, tuple[Any, Any]]:
    """Return the keys of a user's schedule: name -> (type, default)."""
    function = config_lib.find("optimizer.schedule.name", {}, name)
    parameters = inspect.signature(function).parameters
    if not {"learning_rate", "steps"} <= parameters.keys():
        raise ConfigError(f"config.optimizer.schedule.name: {name!r} must have the parameters learning_rate and steps; it has ({', '.join(parameters)}).")
    if "name" in parameters:
        raise ConfigError(f"config.optimizer.schedule.name: {name!r} has a parameter 'name', which is a key of the section already; rename it.")
    hints = typing.get_type_hints(function)
    return {
        key: (hints.get(key, Any), parameter.default)
        for key, parameter in parameters.items()
        if key not in ("learning_rate", "steps") and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def check(schedule: Schedule | OwnSchedule, learning_rate: float, steps: int) -> None:
    """Check that the schedule fits a run of `steps` steps.

    Raises:
      ConfigError: a key has a value out of range, or no meaning for this schedule; or a user's function does not return a schedule.
    """
    if isinstance(schedule, Schedule):
        if not 0 <= schedule.final <= 1:
            raise ConfigError(f"config.optimizer.schedule.final must lie between 0 and 1, got {schedule.final}.")
        if schedule.final and schedule.name in ("constant", "inverse_sqrt"):
            raise ConfigError(f"config.optimizer.schedule.final has no meaning for {schedule.name!r}.")
        if schedule.decay is not None and schedule.name != "wsd":
            raise ConfigError(f"config.optimizer.schedule.decay has no meaning for {schedule.name!r}; only 'wsd' uses it.")
        if schedule.warmup < 0 or steps - schedule.warmup < 1:
            raise ConfigError(f"config.optimizer.schedule.warmup must be at least 0 and below the run's {steps} steps, got {schedule.warmup}.")
        after = steps - schedule.warmup
        if schedule.name == "wsd" and not 0 < (decay := _decay(schedule, steps)) <= after:
            raise ConfigError(f"config.optimizer.schedule.decay={decay} must lie between 1 and the {after} steps after the warm-up.")
        return
    made = make_schedule(learning_rate, schedule, steps)
    try:
        rate = jax.eval_shape(made, jax.ShapeDtypeStruct((), jnp.int32))
        shape = getattr(rate, "shape", None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.optimizer.schedule: {schedule.name!r} must return a function of the step that JAX can trace: {error}") from error
    if shape != ():
        raise ConfigError(f"config.optimizer.schedule: the schedule of {schedule.name!r} must return a scalar, got {rate}.")


def _decay(schedule: Schedule, steps: int) -> int:
    return schedule.decay if schedule.decay is not None else max(1, steps // 10)


def make_schedule(learning_rate: float, schedule: Schedule | OwnSchedule, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates made before.

    Args:
      learning_rate: the peak.
      schedule: its course.
      steps: length of the run, N. A run that is only evaluated may be shorter than the schedule's warm-up and decay.
    """
    if isinstance(schedule, OwnSchedule):
        try:
            made = config_lib.find("optimizer.schedule.name", {}, schedule.name)(learning_rate=learning_rate, steps=steps, **schedule.keys)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.optimizer.schedule: {schedule.name!r} rejects its arguments: {error}") from error
        if not callable(made):
            raise ConfigError(f"config.optimizer.schedule: {schedule.name!r} must return an Optax schedule (a function of the step), got {made!r}.")
        return made
    after = max(1, schedule.decay or 0, steps - schedule.warmup)
    if schedule.name == "constant":
        main = optax.constant_schedule(1.0)
    elif schedule.name == "linear":
        main = optax.linear_schedule(1.0, schedule.final, after)
    elif schedule.name == "cosine":
        main = optax.cosine_decay_schedule(1.0, after, schedule.final)
    elif schedule.name == "wsd":
        decay = min(after, _decay(schedule, steps))
        main = optax.join_schedules([optax.constant_schedule(1.0), optax.linear_schedule(1.0, schedule.final, decay)], [after - decay])
    else:
        scale = max(1, schedule.warmup)
        main = lambda step: (scale / (jnp.maximum(step, 0) + scale)) ** 0.5  # noqa: E731
    if schedule.warmup:
        # The factor of the first step is above 0: an update of size 0 would waste a step.
        warmup = lambda step: (step + 1) / schedule.warmup  # noqa: E731
        main = optax.join_schedules([warmup, main], [schedule.warmup])
    return lambda step: learning_rate * main(step)
