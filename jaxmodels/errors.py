"""The errors a run ends with, and the exit status each has on the command line."""

import importlib
from types import ModuleType


class RunError(Exception):
    """A run cannot go on. The message names the cause, the place, and the next thing to try."""

    exit_status = 1


class ConfigError(RunError):
    """A config, an argument or an input is wrong. Raised before any array is made."""

    exit_status = 2


class Diverged(RunError):
    """The loss, the gradients or the update stopped being finite numbers.

    Attributes:
      step: the number of the first step (1 is the first of the run) whose numbers were not finite.
    """

    exit_status = 3

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Interrupted(RunError):
    """SIGTERM or SIGINT arrived; what was trained is saved, and the same command goes on from there."""

    exit_status = 75


def optional_import(module: str, extra: str) -> ModuleType:
    """A module of a package that only some runs need.

    Args:
      module: its name.
      extra: the extra of jaxmodels that installs it.

    Raises:
      ConfigError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and lacks something itself
        raise ConfigError(f"{module.partition('.')[0]} is not installed, and is needed here: pip install 'jaxmodels[{extra}]'") from error
